# SPDX-License-Identifier: Apache-2.0
"""One door for every profile file: FairKV's own format and those of other projects."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairkv_sglang.profiles.head_profile import FORMAT, HeadProfile, read_json
from fairkv_sglang.profiles.readers import attention_matching, duo_attention, kvzip, tangram
from fairkv_sglang.profiles.readers.table import layer_comment, read_table

FORMATS: dict[str, Callable[..., HeadProfile]] = {
    "fairkv": HeadProfile.load,
    "duo-attention": duo_attention.read,
    "kvzip": kvzip.read,
    "attention-matching": attention_matching.read,
    "tangram": tangram.read,
}


def read_profile(path: str | Path, format: str = "auto", **options: Any) -> HeadProfile:
    """Reads a head profile.

    Args:
        path: A file, or a folder in DuoAttention's layout.
        format: One of ``FORMATS``, or "auto" to tell by name and content.
        **options: How to turn another project's numbers into tokens; see the ``read`` function of
            the format's module in ``profiles/readers``. FairKV's own format takes none.

    Raises:
        ValueError: One line that names the file and says what is wrong and what would be right.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"profile {path}: no such file")
    try:
        if format == "auto":
            format = detect(path)
        if format not in FORMATS:
            raise ValueError(f"unknown format {format!r}; known: auto, {', '.join(FORMATS)}")
        reader = FORMATS[format]
        known = [name for name in inspect.signature(reader).parameters if name != "path"]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(
                f"format {format} has no option {', '.join(unknown)}; it has: "
                f"{', '.join(known) or 'none'}"
            )
        return reader(path, **options)
    except ValueError as error:
        text = " ".join(str(error).split())
        prefix = f"profile {path}: "
        raise ValueError(text if text.startswith(prefix) else prefix + text) from None


def detect(path: Path) -> str:
    """The format of a profile file, by name where upstream fixes it, else by content."""
    if path.is_dir():
        if (path / duo_attention.FILE_NAME).exists():
            return "duo-attention"
        raise ValueError(f"a folder without {duo_attention.FILE_NAME}; give the profile's file")
    if path.suffix == ".safetensors":
        return "fairkv"
    if path.suffix == ".json":
        data = read_json(path)
        if data.get("format") == FORMAT:
            return "fairkv"
        if "kept" in data and "samples" in data:
            return "tangram"
        raise ValueError(
            f'JSON of an unknown kind: neither "format": "{FORMAT}" nor a tangram profile'
        )
    if path.name == duo_attention.FILE_NAME:
        return "duo-attention"
    if path.name.startswith("head_score"):
        return "kvzip"
    table = read_table(path)
    if layer_comment(path) is not None or abs(table.sum() - 1.0) < 1e-3:
        return "attention-matching"
    if (table < 0).any():
        return "duo-attention"
    raise ValueError(f"cannot tell the format; name it as one of: {', '.join(FORMATS)}")

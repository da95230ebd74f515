# SPDX-License-Identifier: Apache-2.0
"""The sizes of a model that budgets and the load model need."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

DTYPE_BYTES = {"auto": 2, "half": 2, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4}
"""Bytes by SGLang's ``--dtype``; with ``auto`` it serves checkpoints in float32 as float16."""


@dataclass(frozen=True)
class ModelShape:
    """What placement and budgets need to know of a model."""

    name: str
    num_layers: int
    num_kv_heads: int
    group_size: int  # query heads per KV head
    head_dim: int
    hidden_size: int
    dtype_bytes: int
    device: str = "cuda"  # kind of device, whose constants the load model takes
    weight_bytes: float | None = None  # of an attention weight, where it is not dtype_bytes

    @classmethod
    def from_config(cls, path: str | Path, dtype: str = "auto", device: str = "cuda") -> ModelShape:
        """Read a Hugging Face ``config.json`` (a file or the folder that holds it), as SGLang does.

        ``dtype`` is a key of ``DTYPE_BYTES``. Raises ValueError with one line if the file is
        unreadable or a size is missing.
        """
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read model config {file}: {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"model config {file}: expected a JSON object")
        text = data.get("text_config") or data.get("llm_config") or data
        try:
            heads = int(text["num_attention_heads"])
            hidden = int(text["hidden_size"])
            layers = int(text["num_hidden_layers"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"model config {file}: num_hidden_layers, num_attention_heads and hidden_size "
                "are needed"
            ) from None
        kv_heads = int(text.get("num_key_value_heads") or heads)
        if min(heads, hidden, layers, kv_heads) < 1 or heads % kv_heads:
            raise ValueError(
                f"model config {file}: {heads} query heads are no multiple of {kv_heads} KV heads"
            )
        return cls(
            name=str(path),
            num_layers=layers,
            num_kv_heads=kv_heads,
            group_size=heads // kv_heads,
            head_dim=int(text.get("head_dim") or hidden // heads),
            hidden_size=hidden,
            dtype_bytes=DTYPE_BYTES[dtype],
            device=device,
        )

# SPDX-License-Identifier: Apache-2.0
"""What the nodes of one server must have been given alike.

Each node has a parent process of its own, with flags and files of its own. A difference would give
ranks other budgets, and answers would be wrong in silence, so all that was given is compared before
a model is loaded. Imports nothing of SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.placement.plan import digest
from fairkv_sglang.version import __version__

_FILES = ("profile", "plan")
_NONE = "none"


def given(config: FairKVConfig) -> dict[str, str]:
    """What a node was given, as texts that are equal if it is: options by name, files by digest.

    Where a file lies does not count.
    """
    options = config.model_dump(mode="json", exclude=set(_FILES))
    texts = {name: _NONE if value is None else str(value) for name, value in options.items()}
    files = {name: file_digest(getattr(config, name)) for name in _FILES}
    return {"version": __version__, **texts, **files}


def difference(nodes: Mapping[int, Mapping[str, str]]) -> str | None:
    """One line on the first node that was given something else than node 0; None if none was.

    Args:
        nodes: What each node was :func:`given`, node 0 among them.
    """
    first = nodes[0]
    for node, other in sorted(nodes.items()):
        names = [n for n in {**first, **other} if other.get(n, _NONE) != first.get(n, _NONE)]
        if names:
            told = ", ".join(
                f"{name} {other.get(name, _NONE)} instead of {first.get(name, _NONE)}"
                for name in names
            )
            return (
                f"FairKV was started otherwise on node {node} than on node 0: {told}; give every "
                "node the same FairKV flags and the same files"
            )
    return None


def file_digest(path: Path | None) -> str:
    if path is None:
        return _NONE
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return "file " + digest(b"".join(file.read_bytes() for file in files))[:16]

# SPDX-License-Identifier: Apache-2.0
"""FairKV for SGLang: a KV-cache budget for every head, and ranks that carry equal loads.

``Engine`` is imported when it is first asked for: SGLang loads this package in every process, and
the engine imports most of SGLang.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fairkv_sglang import source_tree
from fairkv_sglang.version import __version__

if TYPE_CHECKING:
    from fairkv_sglang.config import FairKVConfig
    from fairkv_sglang.engine import Engine

source_tree.settle(__path__)

__all__ = ["Engine", "FairKVConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from fairkv_sglang.engine import Engine

        return Engine
    if name == "FairKVConfig":
        from fairkv_sglang.config import FairKVConfig

        return FairKVConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

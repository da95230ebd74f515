# SPDX-License-Identifier: Apache-2.0
"""``sglang.Engine`` with FairKV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairkv_sglang.config import FairKVConfig, from_mapping
from fairkv_sglang.plugin import check_installation

check_installation()  # a hidden plugin would fail the next import on a machine without GPU

import sglang  # noqa: E402, F401  (brings SGLang's platform, which the next import needs)
from sglang.srt.entrypoints.engine import Engine as StockEngine  # noqa: E402

from fairkv_sglang.patches.server_args import starting  # noqa: E402


class Engine(StockEngine):  # type: ignore[misc]
    """SGLang's offline engine with FairKV.

    Args:
        fairkv: FairKV's options, names without ``--fairkv-``; FairKV is on unless they say
            ``enabled: False``. None leaves the choice to the environment variable
            ``FAIRKV_CONFIG``, as with ``sglang.Engine``.
        **kwargs: SGLang's server arguments.

    Raises:
        ConfigError: for options that are wrong or that SGLang's other arguments rule out.
    """

    def __init__(
        self, fairkv: Mapping[str, Any] | FairKVConfig | None = None, **kwargs: Any
    ) -> None:
        config = None
        if isinstance(fairkv, FairKVConfig):
            config = fairkv
        elif fairkv is not None:
            config = from_mapping({"enabled": True, **fairkv}, "Engine(fairkv=...)")
        with starting(config):
            super().__init__(**kwargs)

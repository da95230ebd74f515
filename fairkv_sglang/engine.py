# SPDX-License-Identifier: Apache-2.0
"""``sglang.Engine`` with FairKV."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fairkv_sglang.config import RESOLVED_VARIABLE, FairKVConfig, from_mapping
from fairkv_sglang.plugin import check_visible

check_visible()  # a hidden plugin would fail the next import on a machine without GPU

import sglang  # noqa: E402, F401  (brings SGLang's platform, which the next import needs)
from sglang.srt.entrypoints.engine import Engine as StockEngine  # noqa: E402


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
        with _handed_down(config):
            super().__init__(**kwargs)


@contextmanager
def _handed_down(config: FairKVConfig | None) -> Iterator[None]:
    """Put ``config`` where child processes find it, as long as they are being started."""
    if config is None:
        yield
        return
    before = os.environ.get(RESOLVED_VARIABLE)
    os.environ[RESOLVED_VARIABLE] = config.to_json()
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(RESOLVED_VARIABLE, None)
        else:
            os.environ[RESOLVED_VARIABLE] = before

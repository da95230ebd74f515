# SPDX-License-Identifier: Apache-2.0
"""``sglang.Engine`` with FairKV, and the body of ``launch.py``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fairkv_sglang.config import RESOLVED_VARIABLE, ConfigError, FairKVConfig, from_mapping
from fairkv_sglang.plugin import check_visible

# Brings SGLang's platform, without which the next import fails on a machine without GPU.
import sglang  # isort: skip
from sglang.srt.entrypoints.engine import Engine as StockEngine  # isort: skip


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
        check_visible()
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


def launch(argv: Sequence[str]) -> None:
    """Start SGLang's server with SGLang's and FairKV's flags, until it is stopped.

    Args:
        argv: The command line without the program's name.
    """
    try:
        check_visible()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(list(argv))
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


__all__ = ["Engine", "launch", "sglang"]

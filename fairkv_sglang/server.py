# SPDX-License-Identifier: Apache-2.0
"""The body of ``launch.py``: SGLang's server with SGLang's and FairKV's flags."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fairkv_sglang.config import ConfigError
from fairkv_sglang.near_miss import missing_package
from fairkv_sglang.plugin import check_installation


def launch(argv: Sequence[str]) -> None:
    """Serve until stopped; wrong flags and missing packages end the process with status 2.

    Args:
        argv: The command line without the program's name.
    """
    try:
        check_installation()
        _serve(list(argv))
    except ConfigError as error:
        _exit(str(error))
    except ModuleNotFoundError as error:
        _exit(missing_package(error))
    except KeyboardInterrupt:  # before the server runs; it ends itself, see patches/server.py
        raise SystemExit(130) from None


def _serve(argv: list[str]) -> None:
    import sglang  # noqa: F401  (brings SGLang's platform, which the next imports need)
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(argv)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _exit(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2) from None

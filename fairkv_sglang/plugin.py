# SPDX-License-Identifier: Apache-2.0
"""SGLang's general plugin entry point.

SGLang calls :func:`register` once in every process: in the parent before it reads its arguments, in
every rank before the scheduler is built. Without ``--fairkv`` it leaves the hooks on the server
arguments and nothing else (on the CPU platform of this package, also the hooks that this platform
needs).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import NoReturn

from fairkv_sglang.config import (
    FILE_VARIABLE,
    FLAG,
    RESOLVED_VARIABLE,
    ConfigError,
    from_environment,
)
from fairkv_sglang.patches import processes, versions

NAME = "fairkv"
"""Name of the entry point, the value for ``SGLANG_PLUGINS``."""
PLATFORM = "fairkv_cpu"
"""Name of the platform's entry point, the value for ``SGLANG_PLATFORM``."""

_RANK = "sglang.srt.managers.scheduler"


def register() -> None:
    """Register this process's hooks with SGLang.

    SGLang logs an exception of a plugin and goes on without it. A rank that served without FairKV
    although it was asked for would be wrong in silence, so it exits instead.
    """
    try:
        versions.check()
    except ConfigError as error:
        if is_asked_for():
            _exit(2, str(error))
        return

    from fairkv_sglang.patches import ledger, server_args

    ledger.register(server_args.flag_hooks())
    try:
        processes.register_process(_is_rank())
    except Exception as error:
        _exit(1, f"FairKV cannot start in this process: {error}")


def _exit(status: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def is_asked_for() -> bool:
    """Whether the command line or the environment names FairKV."""
    variables = (FILE_VARIABLE, RESOLVED_VARIABLE)
    return any(map(os.environ.get, variables)) or any(FLAG in word for word in sys.argv[1:])


def begin() -> None:
    """First of all in a process of SGLang that names FairKV, before SGLang's own modules."""
    if not is_asked_for():
        return
    processes.load_plugins_early()
    # Ctrl-C reaches all processes of a terminal. The parent ends a server, its requests first;
    # a child that ended by itself would be a crash to it. (`parent_process()` is set later.)
    child = "--multiprocessing-fork" in sys.orig_argv and RESOLVED_VARIABLE in os.environ
    if child and threading.current_thread() is threading.main_thread():
        config = from_environment()
        if config is not None and config.enabled:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_rank() -> bool:
    """Whether SGLang's scheduler module is loading plugins, which it does in each rank's process.

    The parent does it elsewhere, as do the detokenizer and the data-parallel controller (from
    SGLang 0.5.22 on).
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == _RANK:
            return True
    return False


def check_installation(environment: Mapping[str, str] = os.environ) -> None:
    """Make sure that SGLang is one that FairKV is made for and will load this plugin.

    Two variables of SGLang hide plugins. Nothing of this package runs when it is hidden, so this is
    called by the ways of starting that belong to it, ``launch.py`` and ``fairkv_sglang.Engine``.

    Raises:
        ConfigError: naming the version, or the variable and its right value.
    """
    versions.check()
    names = {entry.name for entry in entry_points(group="sglang.srt.plugins")}
    if NAME not in names:
        raise ConfigError(
            "SGLang does not see the plugin fairkv: install the package into this environment with "
            "`pip install --no-deps .`"
        )
    allowed = [name.strip() for name in environment.get("SGLANG_PLUGINS", "").split(",")]
    if any(allowed) and NAME not in allowed:
        raise ConfigError(
            f"SGLANG_PLUGINS={environment['SGLANG_PLUGINS']} hides the plugin fairkv: add {NAME} "
            f"(and {PLATFORM} on a machine without a GPU), or unset the variable"
        )
    platform = environment.get("SGLANG_PLATFORM", "")
    if platform not in ("", PLATFORM):
        raise ConfigError(
            f"SGLANG_PLATFORM={platform} makes SGLang skip the plugin fairkv, because its package "
            "brings a platform of its own: unset the variable"
        )

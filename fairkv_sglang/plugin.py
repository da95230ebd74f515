# SPDX-License-Identifier: Apache-2.0
"""SGLang's general plugin entry point.

SGLang calls :func:`register` once in every process: in the parent before it reads its arguments, in
every rank before the scheduler is built. Without ``--fairkv`` it leaves the hooks on the server
arguments and nothing else (on the CPU platform of this package, also the hooks that this platform
needs).
"""

from __future__ import annotations

import os
import sys
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
from fairkv_sglang.patches import versions

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
        if _is_asked_for():
            _exit(2, str(error))
        return

    from fairkv_sglang.patches import ledger, server_args

    ledger.register(server_args.flag_hooks())
    try:
        _register_rank()
    except Exception as error:
        _exit(1, f"FairKV cannot start in this process: {error}")


def _exit(status: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def _is_asked_for() -> bool:
    """Whether the command line or the environment names FairKV."""
    variables = (FILE_VARIABLE, RESOLVED_VARIABLE)
    return any(map(os.environ.get, variables)) or any(FLAG in word for word in sys.argv[1:])


def _register_rank() -> None:
    from fairkv_sglang.patches import cpu, cpu_overrides, ledger, measure
    from fairkv_sglang.patches.cpu_platform import is_active

    on_cpu = is_active()
    hooks = list(cpu.HOOKS) if on_cpu else []
    # Flags are read later than this, and other processes run no model: only ranks need more.
    if _is_rank():
        if on_cpu:
            hooks += cpu.RANK_HOOKS
            cpu.register_attention()
            ledger.need(cpu_overrides)
        config = from_environment()
        if config is not None and config.enabled:
            from fairkv_sglang.patches import all_hooks, all_overrides
            from fairkv_sglang.patches.registries import register_prefix_cache

            rank_hooks = all_hooks()
            targets = {hook.target for hook in rank_hooks}
            hooks = [hook for hook in hooks if hook.target not in targets] + list(rank_hooks)
            register_prefix_cache()
            ledger.need(all_overrides)
        if measure.is_asked_for():
            hooks += measure.HOOKS
    ledger.register(hooks)


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

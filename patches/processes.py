# SPDX-License-Identifier: Apache-2.0
"""Which hooks a process gets, and when: as SGLang loads plugins, or before it would have.

SGLang's servers and ``Engine`` load plugins before they read arguments, and each rank before it
builds its scheduler. Its benchmarks ``offline_throughput``, ``one_batch`` and ``one_batch_server``
read their arguments first, and ``one_batch`` has no scheduler at all. So where FairKV is asked for,
:func:`load_plugins_early` makes the first use of the arguments, and of a model, load them.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from fairkv_sglang.config import from_environment
from fairkv_sglang.patches import server, watching
from fairkv_sglang.patches.ledger import Hook, need, register, verify

_SEVERAL = "tests/engine/test_benchmarks.py"
_is_rank = False  # whether this process has the hooks of a rank
_takes_requests = False  # whether it has those of a server's first process


def register_process(is_rank: bool) -> None:
    """Register what this process needs; ``load_plugins()`` applies it.

    Args:
        is_rank: Whether it runs a model.
    """
    from fairkv_sglang.patches import cpu
    from fairkv_sglang.patches.cpu_platform import is_active

    if is_active():
        register(cpu.HOOKS)
    # Flags are read later than this, and other processes run no model: only ranks need more.
    if is_rank:
        _register_rank()


def _register_rank() -> bool:
    """The hooks of a rank; True if FairKV is on in it."""
    global _is_rank
    from fairkv_sglang.patches import (
        all_hooks,
        all_overrides,
        cpu,
        cpu_overrides,
        cpu_platform,
        measure,
    )

    _is_rank = True
    if cpu_platform.is_active():
        register(cpu.RANK_HOOKS)
        cpu.register_attention()
        need(cpu_overrides)
    config = from_environment()
    on = config is not None and config.enabled
    if on:
        from fairkv_sglang.patches.registries import register_prefix_cache
        from fairkv_sglang.patches.transfer import register_transfer_backend

        register(all_hooks())
        register_prefix_cache()
        register_transfer_backend()
        need(all_overrides)
    if measure.is_asked_for():
        register(measure.HOOKS)
    return on


def register_parent(disaggregated: bool = False) -> None:
    """The hooks of the process that takes requests, FairKV on; they are applied here.

    Args:
        disaggregated: Whether this is a prefill or a decode server.

    Raises:
        HookError: if one has not taken effect.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    from fairkv_sglang.patches import requests, system_prompt

    global _takes_requests

    hooks = (*server.HOOKS, *watching.HOOKS, *requests.HOOKS, *system_prompt.HOOKS)
    if disaggregated:
        from fairkv_sglang.patches import transfer

        transfer.register_transfer_backend()
        hooks = (*hooks, transfer.GET_CLASS)
    if not _takes_requests:
        register(hooks)
        _takes_requests = True
    HookRegistry.apply_hooks()
    verify(hooks)


def before_add_cli_args(*args: Any) -> None:
    """Flags are about to be read."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


def before_model_runner(*args: Any, **kwargs: Any) -> None:
    """A model is about to be built; without a scheduler no plugin has been loaded for that."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    load_plugins()
    if not _is_rank and _register_rank():
        from fairkv_sglang.patches import no_scheduler

        register(no_scheduler.HOOKS)
    HookRegistry.apply_hooks()


EARLY: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.server_args.ServerArgs.add_cli_args",
        kind="before",
        function=before_add_cli_args,
        why="SGLang's benchmarks read their arguments before they load plugins, or load none",
        since="0.5.21",
        upstream="sglang/benchmark/*.py (cli_main)",
        test=_SEVERAL,
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.__init__",
        kind="before",
        function=before_model_runner,
        why="sglang.benchmark.one_batch builds a model without a scheduler, in processes that "
        "load no plugins",
        since="0.5.21",
        upstream="sglang/benchmark/one_batch.py (load_model)",
        test=_SEVERAL,
    ),
    Hook(
        target="sglang.srt.entrypoints.http_server.launch_server",
        kind="before",
        function=server.before_launch,
        why="a port that is taken would be noticed after the model has been loaded",
        since="0.5.17",
        upstream="sglang/srt/entrypoints/http_server.py",
        test="tests/engine/test_platform.py",
    ),
    watching.REPLICAS,
)
"""Not in SGLang's hook registry, which is filled too late: see :class:`_EarlyFinder`."""


class _EarlyFinder:
    """Sets each hook of ``EARLY`` when SGLang has imported its module.

    SGLang resolves its platform, and so this package, before it imports any of them.
    """

    def __init__(self) -> None:
        self._hooks = {_module(hook.target): hook for hook in EARLY}

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> Any:
        """The module's own spec, whose loader sets the hook after it has run the module."""
        hook = self._hooks.pop(name, None)
        if hook is None:
            return None
        spec = importlib.util.find_spec(name)  # comes back here, and finds nothing
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_hook(module: ModuleType) -> None:
                run(module)
                set_early(hook)

            spec.loader.exec_module = run_and_hook  # type: ignore[method-assign]
        return spec


def _module(target: str) -> str:
    """The module that a function or a method of a class is in."""
    path, _, _ = target.rpartition(".")
    owner, _, name = path.rpartition(".")
    return owner if name[0].isupper() else path


def set_early(hook: Hook) -> None:
    """Let SGLang's function or method call the hook's first.

    The call that loads the plugins goes on in what their hooks have made of it.
    """
    path, _, name = hook.target.rpartition(".")
    owner = pkgutil.resolve_name(path)
    raw = vars(owner)[name]
    original: Callable[..., Any] = getattr(raw, "__func__", raw)
    function = hook.function

    @wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = getattr(owner, name)
        function(*args, **kwargs)
        hooked = getattr(owner, name)
        return (original if hooked is before else hooked)(*args, **kwargs)

    setattr(owner, name, staticmethod(run) if isinstance(raw, staticmethod) else run)


def load_plugins_early() -> None:
    """From the first look-ups of SGLang's modules on; may be called again."""
    if not any(isinstance(finder, _EarlyFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _EarlyFinder())  # type: ignore[arg-type]

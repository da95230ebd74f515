# SPDX-License-Identifier: Apache-2.0
"""Every touch on SGLang. Installed as ``fairkv_sglang.patches``; never a top-level import.

``ledger.py`` says what a hook is and checks that it took effect; the other files hold the hooks,
one file per subsystem of SGLang. ``fairkv check`` prints the ledger.
"""

from __future__ import annotations

from fairkv_sglang.patches.ledger import Hook, HookError, verify
from fairkv_sglang.patches.overrides import Override

__all__ = ["Hook", "HookError", "all_hooks", "all_overrides", "cpu_overrides", "verify_hooks"]


def all_hooks() -> tuple[Hook, ...]:
    """The hooks of a serving rank, in ledger order (imports SGLang's scheduler)."""
    from fairkv_sglang.patches import (
        disaggregation,
        loads,
        models,
        passes,
        pools,
        registries,
        repeats,
        request_options,
        scheduling,
        state,
    )

    modules = (
        pools,
        models,
        registries,
        request_options,
        repeats,
        scheduling,
        passes,
        state,
        loads,
        disaggregation,
    )
    return tuple(hook for module in modules for hook in module.HOOKS)


def all_overrides() -> tuple[Override, ...]:
    """Methods of SGLang's classes that a serving rank overrides."""
    from fairkv_sglang.patches import (
        attention_backend,
        forced_tokens,
        pools,
        prefill_budget,
        prefix_cache,
        transfer,
    )

    modules = (pools, prefix_cache, prefill_budget, attention_backend, forced_tokens, transfer)
    return tuple(row for module in modules for row in module.OVERRIDES)


def cpu_overrides() -> tuple[Override, ...]:
    """The same of the CPU platform of this package."""
    from fairkv_sglang.patches import cpu_allocator, cpu_attention, cpu_platform

    modules = (cpu_platform, cpu_allocator, cpu_attention)
    return tuple(row for module in modules for row in module.OVERRIDES)


def verify_hooks() -> list[str]:
    """Check a serving rank's rows in this process; see ``ledger.verify``."""
    return verify((*all_hooks(), *all_overrides()))

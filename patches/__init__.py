# SPDX-License-Identifier: Apache-2.0
"""Every touch on SGLang. Installed as ``fairkv_sglang.patches``; never a top-level import.

``ledger.py`` says what a hook is and checks that it took effect; the other files hold the hooks,
one file per subsystem of SGLang. ``fairkv check`` prints the ledger.
"""

from __future__ import annotations

from fairkv_sglang.patches.ledger import Hook, HookError, verify

__all__ = ["Hook", "HookError", "all_hooks", "verify_hooks"]


def all_hooks() -> tuple[Hook, ...]:
    """The hooks of a serving rank, in ledger order (imports SGLang's scheduler)."""
    from fairkv_sglang.patches import models, pools, registries, scheduling, state

    return (*pools.HOOKS, *models.HOOKS, *registries.HOOKS, *scheduling.HOOKS, *state.HOOKS)


def verify_hooks() -> list[str]:
    """Check the whole ledger in this process; see :func:`fairkv_sglang.patches.ledger.verify`."""
    return verify(all_hooks())

# SPDX-License-Identifier: Apache-2.0
"""Budget scopes: over which heads a budget is shared. One file each."""

from __future__ import annotations

from typing import Any

from fairkv_sglang.budgets.scopes.base import SCOPES, BudgetScope, BudgetSpec
from fairkv_sglang.budgets.scorers import Scorer
from fairkv_sglang.model import Sliding
from fairkv_sglang.profiles import HeadProfile
from fairkv_sglang.registry import import_all

import_all(__name__, __path__)


def make_scope(
    name: str,
    spec: BudgetSpec,
    num_layers: int,
    num_heads: int,
    scorer: Scorer,
    profile: HeadProfile | None = None,
    sliding: Sliding | None = None,
    **options: Any,
) -> BudgetScope:
    """The scope of this name, with window and sink of the scorer.

    Raises:
        ValueError: Unknown name or option; profile missing or of another model; budget below
            window + sink.
    """
    return SCOPES.make(
        name,
        spec,
        num_layers,
        num_heads,
        scorer.window,
        profile,
        scorer.sink,
        0,
        sliding,
        **options,
    )


__all__ = ["SCOPES", "BudgetScope", "BudgetSpec", "make_scope"]

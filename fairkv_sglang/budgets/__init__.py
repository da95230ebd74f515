# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a prompt each head keeps: scorer (how important) x scope (how many)."""

from __future__ import annotations

from fairkv_sglang.budgets.keep import AS_SERVER, Keep
from fairkv_sglang.budgets.prompt_tensors import PromptTensors
from fairkv_sglang.budgets.rope import Rope
from fairkv_sglang.budgets.scopes import SCOPES, BudgetScope, BudgetSpec, make_scope
from fairkv_sglang.budgets.scorers import SCORERS, Scorer, make_scorer
from fairkv_sglang.budgets.selection import Kept, pick

__all__ = [
    "AS_SERVER",
    "SCOPES",
    "SCORERS",
    "BudgetScope",
    "BudgetSpec",
    "Keep",
    "Kept",
    "PromptTensors",
    "Rope",
    "Scorer",
    "make_scope",
    "make_scorer",
    "pick",
]

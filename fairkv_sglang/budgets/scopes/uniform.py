# SPDX-License-Identifier: Apache-2.0
"""Scope ``uniform``: the same budget for every head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fairkv_sglang.budgets.scopes.base import SCOPES, BudgetScope


@SCOPES.register
@dataclass(eq=False, kw_only=True)
class Uniform(BudgetScope):
    """Every head keeps its own best B(N) tokens, as plain SnapKV does. The profile is not used."""

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "every head the same"
    input_dependent: ClassVar[bool] = False
    spans_ranks: ClassVar[bool] = False

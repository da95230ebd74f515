# SPDX-License-Identifier: Apache-2.0
"""Scope ``retrieval`` (DuoAttention, arXiv 2410.10819): heads that retrieve keep everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fairkv_sglang.budgets.scopes.base import SCOPES, BudgetScope
from fairkv_sglang.budgets.waterfill import IntArray


@SCOPES.register
@dataclass(eq=False, kw_only=True)
class Retrieval(BudgetScope):
    """Heads whose share of the profile is above its mean keep N tokens, the others B(N).

    Here the budget is that of the others. With a profile of two classes, as those of DuoAttention
    are read, heads of the upper one keep everything whatever N is; scope ``head``, whose total is
    L * H * B(N), does so for one N.
    """

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "all in heads above the profile's mean, the budget in the others"
    input_dependent: ClassVar[bool] = False
    spans_ranks: ClassVar[bool] = False
    needs_profile: ClassVar[bool] = True

    def _expected(self, prompt_len: int) -> IntArray:
        whole = self.shares > self.shares.mean() * (1 + 1e-9)  # equal ones are no class above
        return np.where(whole, prompt_len, self.budget(prompt_len)).astype(np.int64)

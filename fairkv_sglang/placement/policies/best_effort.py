# SPDX-License-Identifier: Apache-2.0
"""``best_effort``: whole heads by load, uneven counts allowed, no copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.policies.base import POLICIES, Policy
from fairkv_sglang.placement.solver.curves import layer_curves
from fairkv_sglang.placement.solver.problem import Problem
from fairkv_sglang.placement.solver.slots import within_slots
from fairkv_sglang.placement.solver.stay import stay_home


@POLICIES.register
@dataclass(frozen=True)
class BestEffort(Policy):
    """Whole heads by load, uneven counts allowed, no copies."""

    name: ClassVar[str] = "best_effort"
    summary: ClassVar[str] = "by load, any number of whole heads on a rank, no copies"

    def place(self, problem: Problem, options: PlanOptions) -> FloatArray:
        """Shares ``[L, R, H]`` with the fewest possible copies: none unless heads < ranks.

        Optimal for up to 9 heads; largest-first with moves and swaps above. With fewer heads than
        ranks each head is split evenly over the ranks that it gets.
        """
        curves = layer_curves(problem)
        copies = max(problem.ranks - problem.heads, 0)
        shares = np.stack([curves.build(layer, copies) for layer in range(problem.layers)])
        shares = within_slots(problem, options, shares, copying=False)
        return stay_home(problem, options, shares, copying=False)

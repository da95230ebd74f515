# SPDX-License-Identifier: Apache-2.0
"""Level by number of copies of every layer, exact for few heads, heuristic for many."""

from __future__ import annotations

from fairkv_sglang.placement.solver.large_curves import LargeCurves
from fairkv_sglang.placement.solver.problem import Problem
from fairkv_sglang.placement.solver.small_curves import MAX_HEADS, SmallCurves

Curves = SmallCurves | LargeCurves


def layer_curves(problem: Problem) -> Curves:
    """The curves of all layers of a problem."""
    if problem.heads <= MAX_HEADS:
        return SmallCurves(problem.costs, problem.ranks, problem.lane)
    return LargeCurves(problem.costs, problem.ranks, problem.lane)

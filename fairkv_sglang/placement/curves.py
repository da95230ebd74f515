# SPDX-License-Identifier: Apache-2.0
"""Level by number of copies of every layer, exact for few heads, heuristic for many."""

from __future__ import annotations

from fairkv_sglang.placement.groups import MAX_HEADS, SmallCurves
from fairkv_sglang.placement.pack import LargeCurves
from fairkv_sglang.placement.problem import Problem

Curves = SmallCurves | LargeCurves


def layer_curves(problem: Problem) -> Curves:
    """The curves of all layers of a problem."""
    if problem.heads <= MAX_HEADS:
        return SmallCurves(problem.costs, problem.ranks, problem.lane)
    return LargeCurves(problem.costs, problem.ranks, problem.lane)

# SPDX-License-Identifier: Apache-2.0
"""Lane slots: layers in which no rank may have more than so many lanes, and how many to have.

Packing heads that can be divided, at most ``S`` to a rank, is NP-hard (F. Chung, R. Graham, J. Mao,
G. Varghese, "Parallelism versus memory allocation in pipelined router forwarding engines", Theory
of Computing Systems 39, 2006). Here a layer starts from contiguous heads, relieved as far as that
goes, and is improved lane by lane (``lane_search.py``).
"""

from __future__ import annotations

import numpy as np

from fairkv_sglang.placement.homes import blocks, home_table
from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.solver.lane_search import MAX_RANKS, Support, balanced_shares
from fairkv_sglang.placement.solver.problem import Problem, lower_bound, rank_loads
from fairkv_sglang.placement.solver.stay import relieve

_HALVINGS = 10
_MIN_GAIN = 1e-4


def within_slots(
    problem: Problem, options: PlanOptions, shares: FloatArray, *, copying: bool = True
) -> FloatArray:
    """``shares [L, R, H]`` with the layers made anew in which a rank has more lanes than slots.

    ``copying``: copies may be made; all layers are made anew then where slots are paid for.
    """
    over = ((shares > 0).sum(axis=2) > options.slots(problem.heads)).any(axis=1)
    if options.paid and copying and problem.ranks <= MAX_RANKS:
        over[:] = True
    out = shares.copy()
    for layer in np.flatnonzero(over):
        out[layer] = _fit(problem.costs[layer], problem, options, copying)
    return out


def _fit(costs: FloatArray, problem: Problem, options: PlanOptions, copying: bool) -> FloatArray:
    """Shares ``[R, H]`` of a layer: the lowest level that is found."""
    ranks, heads, lane = problem.ranks, problem.heads, problem.lane
    slots, most = options.slots(heads), options.most_copies(heads * (ranks - 1))
    plan, home = blocks(heads, ranks), home_table(heads, ranks)
    if copying and ranks <= MAX_RANKS:
        layer = Support(plan > 0, costs, costs[None], lane, slots, most)
        gain, served = layer.next_step()
        while gain > _MIN_GAIN * layer.level:
            layer.take(served)
            gain, served = layer.next_step()
        return balanced_shares(costs, layer.served, lane)
    low = float(lower_bound(costs[None], ranks, lane)[0])
    high = float(rank_loads(plan, costs, lane).max())
    best = plan
    for _ in range(_HALVINGS):
        target = 0.5 * (low + high)
        found = relieve(plan, home, costs, lane, target, most if copying else None, slots)
        if found is None:
            low = target
        else:
            best, high = found, target
    return best

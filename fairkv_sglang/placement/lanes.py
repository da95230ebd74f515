# SPDX-License-Identifier: Apache-2.0
"""Even lanes: plans that do not make prefill wait.

Decode reads kept tokens, so a rank may serve one hungry head and its neighbour seven modest ones.
Prefill computes every prompt for every lane, and there the neighbour takes seven times as long.
Both can be even at once: start from equally many heads on each rank and copy a few, which moves
load by free shares while lanes stay within one or two of each other.
"""

from __future__ import annotations

import numpy as np

from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.policies.contiguous import contiguous
from fairkv_sglang.placement.policies.equal_count import equal_count
from fairkv_sglang.placement.problem import Problem
from fairkv_sglang.placement.spare import balanced_shares


def even_lanes(problem: Problem, options: PlanOptions, shares: FloatArray) -> FloatArray:
    """Layer by layer the best of ``shares [L, R, H]`` and of plans with even lanes.

    With a prefill cost the best is the lowest decode plus prefill. Without, it is the one whose
    fullest rank has fewest lanes among those whose decode is within ``options.lane_tolerance`` of
    the lowest. Unchanged if neither is given, or if copies are limited.
    """
    limited = (options.max_copies_per_layer, options.max_copies_per_rank, options.max_extra_bytes)
    wanted = problem.prefill > 0.0 or options.lane_tolerance > 1.0
    if not wanted or problem.heads < problem.ranks or any(x is not None for x in limited):
        return shares
    candidates = [shares, contiguous(problem, options)]
    dealt = equal_count(problem, options)
    for _ in range(problem.ranks):
        candidates.append(dealt)
        dealt = np.stack([_one_more(problem, layer, part) for layer, part in enumerate(dealt)])
    stacked = np.stack(candidates)
    if problem.prefill > 0.0:
        value = np.stack([problem.step_costs(x) for x in candidates])  # [C, L]
    else:
        decode = np.stack([problem.rank_costs(x).max(axis=1) for x in candidates])
        lanes = (stacked > 0).sum(axis=3).max(axis=2)
        near = decode <= decode.min(axis=0) * options.lane_tolerance
        value = np.where(near, lanes + decode / decode.max(axis=0), np.inf)
    best = value.argmin(axis=0)
    chosen: FloatArray = stacked[best, np.arange(problem.layers)]
    return chosen


def _one_more(problem: Problem, layer: int, shares: FloatArray) -> FloatArray:
    """``shares [R, H]`` of a layer with one more copy: of a head of the fullest rank, on the
    emptiest rank that does not serve it, so that the layer's fullest rank gets lowest.
    """
    costs, support = problem.costs[layer], shares > 0
    load = (shares * costs).sum(axis=1) + problem.lane * support.sum(axis=1)
    top = int(load.argmax())
    best, best_level = shares, load[top]
    for rank in np.argsort(load, kind="stable")[:2]:
        for head in np.flatnonzero(support[top] & ~support[rank]):
            wider = support.copy()
            wider[rank, head] = True
            tried = balanced_shares(costs, wider, problem.lane)
            level = ((tried * costs).sum(axis=1) + problem.lane * wider.sum(axis=1)).max()
            if level < best_level * (1 - 1e-9):
                best, best_level = tried, level
    return best

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

_HEADS_TRIED = 4
"""Heads of the fullest rank, largest first, of which one gets a copy."""


def even_lanes(problem: Problem, options: PlanOptions, shares: FloatArray) -> FloatArray:
    """Layer by layer the best of ``shares [L, R, H]`` and of plans with even lanes.

    With a prefill cost the best is the lowest decode plus prefill. Without, it is the one whose
    fullest rank has fewest lanes among those whose decode is within ``options.lane_tolerance`` of
    the lowest. Unchanged if neither is given, with fewer heads than ranks, and under limits on
    copies of a rank or on their bytes (``problem.notes`` says so if prefill had a cost).
    """
    if problem.prefill <= 0.0 and options.lane_tolerance <= 1.0:
        return shares
    limited = options.max_copies_per_rank is not None or options.max_extra_bytes is not None
    if problem.heads < problem.ranks or limited:
        if problem.prefill > 0.0:
            problem.notes["prefill"] = "not weighed: too few heads, or copies are limited"
        return shares
    plain, dealt = contiguous(problem, options), equal_count(problem, options)
    most = problem.ranks - 1
    if options.max_copies_per_layer is not None:
        most = min(most, options.max_copies_per_layer)
    layers = [
        _best(problem, options, layer, [shares[layer], plain[layer], dealt[layer]], most)
        for layer in range(problem.layers)
    ]
    return np.stack(layers)


def _best(
    problem: Problem, options: PlanOptions, layer: int, plans: list[FloatArray], copies: int
) -> FloatArray:
    """The best of a layer's ``plans`` and of the last one with up to ``copies`` more copies."""
    decode = [float(_load(problem, layer, plan).max()) for plan in plans]
    lanes = [int((plan > 0).sum(axis=1).max()) for plan in plans]

    def value(index: int) -> float:
        return decode[index] + problem.prefill * lanes[index]

    for _ in range(copies):
        # Copies cost lanes: no more of them once decode is low enough, or both together get worse.
        if problem.prefill > 0.0 and len(plans) > 3 and value(-1) > value(-2):
            break
        if problem.prefill <= 0.0 and decode[-1] <= min(decode) * options.lane_tolerance:
            break
        plan = _one_more(problem, layer, plans[-1])
        if plan is plans[-1]:
            break
        plans.append(plan)
        decode.append(float(_load(problem, layer, plan).max()))
        lanes.append(int((plan > 0).sum(axis=1).max()))
    indices = range(len(plans))
    if problem.prefill > 0.0:
        return plans[min(indices, key=value)]
    near = [i for i in indices if decode[i] <= min(decode) * options.lane_tolerance]
    return plans[min(near, key=lambda i: (lanes[i], decode[i]))]


def _load(problem: Problem, layer: int, shares: FloatArray) -> FloatArray:
    """Decode cost ``[R]`` of a layer with ``shares [R, H]``; :meth:`Problem.rank_costs` of one."""
    used: FloatArray = (shares * problem.costs[layer]).sum(axis=1)
    load: FloatArray = used + problem.lane * (shares > 0).sum(axis=1)
    return load


def _one_more(problem: Problem, layer: int, shares: FloatArray) -> FloatArray:
    """``shares [R, H]`` with one more copy, of a head of the fullest rank on the emptiest, so that
    the fullest rank gets lowest; ``shares`` itself if no copy helps.
    """
    costs, support = problem.costs[layer], shares > 0
    load = _load(problem, layer, shares)
    top, rank = int(load.argmax()), int(load.argmin())
    best, best_level = shares, float(load[top])
    useful = np.flatnonzero(support[top] & ~support[rank])
    largest = useful[np.argsort(-(shares[top] * costs)[useful], kind="stable")]
    for head in largest[:_HEADS_TRIED]:
        wider = support.copy()
        wider[rank, head] = True
        tried = balanced_shares(costs, wider, problem.lane)
        level = float(_load(problem, layer, tried).max())
        if level < best_level * (1 - 1e-9):
            best, best_level = tried, level
    return best

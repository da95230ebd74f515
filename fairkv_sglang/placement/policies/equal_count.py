# SPDX-License-Identifier: Apache-2.0
"""``equal_count``: by load, but the same number of heads on every rank; no copies."""

from __future__ import annotations

import numpy as np

from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.problem import Problem
from fairkv_sglang.placement.stay import stay_home


def equal_count(problem: Problem, options: PlanOptions) -> FloatArray:
    """Shares ``[L, R, H]``: counts differ by at most one where heads / ranks has a remainder.

    Largest first to the emptiest rank with a free slot, then swaps. With fewer heads than ranks
    each rank serves one head; spare ranks go to the heads with the most load per copy.
    """
    out = np.zeros((problem.layers, problem.ranks, problem.heads))
    for layer, costs in enumerate(problem.costs):
        if problem.heads < problem.ranks:
            out[layer] = _one_each(costs, problem.ranks)
        else:
            for rank, heads in enumerate(_deal(costs, problem.ranks)):
                out[layer, rank, heads] = 1.0
    return stay_home(problem, options, out, between=False)


def _one_each(costs: FloatArray, ranks: int) -> FloatArray:
    heads = len(costs)
    count = np.ones(heads)
    for _ in range(ranks - heads):
        load = costs / count
        count[np.lexsort((count, -load))[0]] += 1
    shares = np.zeros((ranks, heads))
    shares[np.arange(ranks), np.repeat(np.arange(heads), count.astype(np.int64))] = 1.0
    return shares / count


def _deal(costs: FloatArray, ranks: int) -> list[list[int]]:
    heads = len(costs)
    small, larger = divmod(heads, ranks)
    bins: list[list[int]] = [[] for _ in range(ranks)]
    used = np.zeros(ranks)
    full = 0  # ranks that hold small + 1 heads
    for head in np.argsort(-costs, kind="stable"):
        most = small + (full < larger)
        free = [r for r in range(ranks) if len(bins[r]) < most]
        rank = min(free, key=lambda r: (used[r], r))
        full += len(bins[rank]) == small
        bins[rank].append(int(head))
        used[rank] += costs[head]
    for _ in range(4 * heads):
        if not _swap(bins, used, costs):
            break
    return bins


def _swap(bins: list[list[int]], used: FloatArray, costs: FloatArray) -> bool:
    """The exchange between the fullest rank and another that lowers the fuller of the two most."""
    top = int(used.argmax())
    best, best_swap = used[top] * (1 - 1e-9), (-1, 0, 0)
    for other in range(len(bins)):
        if other == top:
            continue
        give = costs[bins[top]][:, None] - costs[bins[other]][None, :]
        after = np.maximum(used[top] - give, used[other] + give)
        index = int(after.argmin())
        if after.flat[index] < best:
            i, j = divmod(index, len(bins[other]))
            best, best_swap = float(after.flat[index]), (other, i, j)
    other, i, j = best_swap
    if other < 0:
        return False
    change = costs[bins[top][i]] - costs[bins[other][j]]
    used[top] -= change
    used[other] += change
    bins[top][i], bins[other][j] = bins[other][j], bins[top][i]
    return True

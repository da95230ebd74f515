# SPDX-License-Identifier: Apache-2.0
"""``equal_shares``: copies with equal shares, after EPLB; for comparison.

Each spare slot copies the head with the largest load per copy, then the slots are packed, largest
first, onto the emptiest rank that does not hold that head yet (the greedy of
https://github.com/deepseek-ai/EPLB, with uneven slot counts allowed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.policies.base import POLICIES, Copying
from fairkv_sglang.placement.solver.problem import Problem, rank_loads
from fairkv_sglang.placement.solver.stay import stay_home


@POLICIES.register
@dataclass(frozen=True)
class EqualShares(Copying):
    """Copies with equal shares, after EPLB; for comparison."""

    name: ClassVar[str] = "equal_shares"
    summary: ClassVar[str] = "copies with equal shares, after EPLB, for comparison"

    def place(self, problem: Problem, options: PlanOptions) -> FloatArray:
        """Shares ``[L, R, H]``; per layer the number of copies with the lowest fullest rank.

        Up to ``2 * ranks`` copies are tried (or as many as ``options`` allows); with free copies
        the fewest within ``options.tolerance`` of the mean win, if any is.
        """
        options = self.limited(options)
        least = max(problem.ranks - problem.heads, 0)
        most = max(options.most_copies(2 * problem.ranks), least)
        out = np.zeros((problem.layers, problem.ranks, problem.heads))
        for layer, costs in enumerate(problem.costs):
            best = np.inf
            goal = costs.sum() / problem.ranks * options.tolerance if problem.lane <= 0.0 else 0.0
            for copies in range(least, min(most, problem.heads * (problem.ranks - 1)) + 1):
                shares = spread(
                    costs, problem.ranks, problem.lane, copies, options.slots(problem.heads)
                )
                if shares is None:
                    break
                level = float(rank_loads(shares, costs, problem.lane).max())
                if level < best * (1 - 1e-9):
                    best = level
                    out[layer] = shares
                if level <= goal:
                    break
        return stay_home(problem, options, out, copying=False)


def spread(
    costs: FloatArray, ranks: int, lane: float, copies: int, lanes: int
) -> FloatArray | None:
    """Shares ``[R, H]`` of one layer with exactly ``copies`` equal-share copies, at most ``lanes``
    on a rank; None where the greedy finds no room.
    """
    heads = len(costs)
    count = [1] * heads
    for _ in range(copies):
        open_heads = [h for h in range(heads) if count[h] < ranks]
        head = max(open_heads, key=lambda h: (costs[h] / count[h], -count[h], -h))
        count[head] += 1
    slots = sorted(
        ((float(costs[h]) / count[h], h) for h in range(heads) for _ in range(count[h])),
        key=lambda slot: (-slot[0], slot[1]),
    )
    used = [0.0] * ranks
    held: list[set[int]] = [set() for _ in range(ranks)]
    for position, (cost, head) in enumerate(slots):
        empty = [r for r in range(ranks) if not held[r]]
        must_fill = len(empty) >= len(slots) - position
        free = empty if must_fill else range(ranks)
        choice = [r for r in free if head not in held[r] and len(held[r]) < lanes]
        if not choice:
            return None
        rank = min(choice, key=lambda r: (used[r], len(held[r]), r))
        held[rank].add(head)
        used[rank] += cost + lane
    shares = np.zeros((ranks, heads))
    for rank in range(ranks):
        for head in sorted(held[rank]):
            shares[rank, head] = 1.0 / count[head]
    return shares

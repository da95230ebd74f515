# SPDX-License-Identifier: Apache-2.0
"""``exact``: each layer as a mixed-integer program, solved by HiGHS through scipy.

    minimise T   subject to   sum_r x[r,h] = 1,   0 <= x[r,h] <= y[r,h],   y[r,h] in {0, 1},
                              sum_h (cost[h] x[r,h] + lane y[r,h]) <= T,   sum_h y[r,h] in 1..slots.

Ranks are interchangeable; ordering them by load removes most of that symmetry. HiGHS: Q. Huangfu,
J. A. J. Hall, "Parallelizing the dual revised simplex method", Math. Prog. Comp. 10, 2018.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix, csr_matrix

from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.policies.base import POLICIES, Copying
from fairkv_sglang.placement.policies.fair_copying import FairCopying
from fairkv_sglang.placement.solver.problem import Problem, lower_bound, rank_loads
from fairkv_sglang.placement.solver.stay import stay_home

_GAP = 1e-4


@POLICIES.register
@dataclass(frozen=True)
class Exact(Copying):
    """Each layer as a mixed-integer program, solved by HiGHS through scipy."""

    name: ClassVar[str] = "exact"
    summary: ClassVar[str] = "a mixed-integer program per layer (HiGHS), for comparison"

    def place(self, problem: Problem, options: PlanOptions) -> FloatArray:
        """Shares ``[L, R, H]``; each layer has ``options.time_limit`` seconds.

        A layer without a solution in time, or with one above ``fair_copying``'s, takes the latter.
        Notes: which layers are proved optimal within a gap of 1e-4 and the largest remaining gap.
        """
        options = self.limited(options)
        plain = replace(problem, samples=None)
        fallback = FairCopying().place(
            plain, options.model_copy(update={"spread": 0.0, "tolerance": 1.0})
        )
        out = fallback.copy()
        levels = problem.rank_costs(fallback).max(axis=1)
        proved, gaps = [], []
        for layer in range(problem.layers):
            shares, bound, optimal = solve_layer(
                problem.costs[layer], problem.ranks, problem.lane, options, float(levels[layer])
            )
            level = float(levels[layer])
            if shares is not None:
                reached = float(rank_loads(shares, problem.costs[layer], problem.lane).max())
                if reached < level * (1 - 1e-6):
                    out[layer], level = shares, reached
            gaps.append(max(level - bound, 0.0) / level if level > 0.0 else 0.0)
            proved.append(bool(optimal or gaps[-1] <= _GAP))
        problem.notes.update(
            solver="scipy.optimize.milp (HiGHS)",
            layers_proved=int(sum(proved)),
            proved=proved,
            largest_gap=float(max(gaps)),
        )
        return stay_home(problem, options, out)


def solve_layer(
    costs: FloatArray, ranks: int, lane: float, options: PlanOptions, upper: float
) -> tuple[FloatArray | None, float, bool]:
    """Shares ``[R, H]`` (None: none found), proven lower bound, whether proved optimal.

    ``upper``: level of a known plan; the search is for something no worse.
    """
    heads = len(costs)
    scale = max(upper, 1e-300)
    load, fixed = costs / scale, lane / scale
    floor = float(lower_bound(costs[None], ranks, lane)[0]) / scale
    if floor >= 1.0 - 1e-9:
        return None, upper, True  # the known plan is at the closed bound
    size = ranks * heads
    x = np.arange(size).reshape(ranks, heads)
    y, top = x + size, 2 * size
    rows: list[tuple[list[int], list[float], float, float]] = []
    for head in range(heads):
        rows.append(([int(i) for i in x[:, head]], [1.0] * ranks, 1.0, 1.0))
    for rank in range(ranks):
        cells = [int(i) for i in x[rank]] + [int(i) for i in y[rank]]
        weights = [float(c) for c in load] + [fixed] * heads
        rows.append(([*cells, top], [*weights, -1.0], -np.inf, 0.0))
        rows.append(([int(i) for i in y[rank]], [1.0] * heads, 1.0, options.slots(heads)))
        if rank + 1 < ranks:  # ranks in falling order of load
            after = [int(i) for i in x[rank + 1]] + [int(i) for i in y[rank + 1]]
            rows.append((cells + after, weights + [-w for w in weights], 0.0, np.inf))
    for cell in range(size):
        rows.append(([cell, cell + size], [1.0, -1.0], -np.inf, 0.0))
    if options.max_copies_per_layer is not None:
        most = heads + max(options.max_copies_per_layer, ranks - heads)
        rows.append(([int(i) for i in y.ravel()], [1.0] * size, 0.0, float(most)))
    integrality = np.concatenate([np.zeros(size), np.ones(size), [0.0]])
    low = np.concatenate([np.zeros(2 * size), [floor]])
    high = np.concatenate([np.ones(2 * size), [1.0 + 1e-6]])
    goal = np.zeros(2 * size + 1)
    goal[top] = 1.0
    result = milp(
        goal,
        integrality=integrality,
        bounds=Bounds(low, high),
        constraints=LinearConstraint(
            _matrix(rows, 2 * size + 1), [r[2] for r in rows], [r[3] for r in rows]
        ),
        options={"time_limit": options.time_limit, "mip_rel_gap": _GAP},
    )
    bound = result.mip_dual_bound
    bound = floor if bound is None or not np.isfinite(bound) else max(float(bound), floor)
    if result.x is None:
        return None, bound * scale, False
    return _shares(result.x, x, y), bound * scale, bool(result.status == 0)


def _shares(
    values: FloatArray,
    x: np.ndarray[tuple[int, int], np.dtype[np.int64]],
    y: np.ndarray[tuple[int, int], np.dtype[np.int64]],
) -> FloatArray:
    shares = np.where(values[x] > 1e-7, values[x], 0.0)
    # A rank whose lanes all have no share still needs one head: keep its lane with a tiny share.
    for rank in np.flatnonzero((shares > 0).sum(axis=1) == 0):
        shares[rank, int(values[y[rank]].argmax())] = 1e-6
    return np.asarray(shares / shares.sum(axis=0, keepdims=True), dtype=np.float64)


def _matrix(rows: list[tuple[list[int], list[float], float, float]], columns: int) -> csr_matrix:
    index = np.concatenate([np.full(len(row[0]), i) for i, row in enumerate(rows)])
    cells = np.concatenate([np.asarray(row[0]) for row in rows])
    values = np.concatenate([np.asarray(row[1]) for row in rows])
    return coo_matrix((values, (index, cells)), shape=(len(rows), columns)).tocsr()

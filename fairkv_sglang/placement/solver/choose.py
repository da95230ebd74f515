# SPDX-License-Identifier: Apache-2.0
"""How many copies each layer gets: an exact multiple-choice knapsack over the layers' curves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.solver.curves import Curves
from fairkv_sglang.placement.solver.problem import Problem

IntArray = NDArray[np.int64]


def choose_copies(curves: Curves, problem: Problem, options: PlanOptions) -> IntArray:
    """Copies ``[L]`` within the limit.

    Free copies: the fewest in total with which the sum of the levels is within
    ``options.tolerance`` of the mean. Otherwise the lowest sum of the levels, ties to fewer.
    Raises ValueError if the copies that fewer heads than ranks make unavoidable are over the limit.
    """
    least = max(problem.ranks - problem.heads, 0)
    most = options.most_copies(problem.ranks - 1)
    if most < least:
        raise ValueError(
            f"the limit of {most} copies in a layer cannot be met: {problem.heads} heads on "
            f"{problem.ranks} ranks need {least} in every layer"
        )
    best, choice = _knapsack(np.minimum.accumulate(curves.levels[least : most + 1], axis=0))
    if problem.lane <= 0.0:
        goal = problem.costs.sum() / problem.ranks * options.tolerance
        enough = best <= goal * (1 + 1e-12)
    else:
        enough = np.zeros(len(best), dtype=bool)
    if not enough.any():
        enough = best <= best.min() * (1 + 1e-9)
    spent = int(enough.argmax())
    copies = np.zeros(problem.layers, dtype=np.int64)
    for layer in range(problem.layers - 1, -1, -1):
        extra = int(choice[layer, spent])
        spent -= extra
        # Fewer copies may reach the same level; only counts with a plan of their own can be built.
        copies[layer] = int(curves.levels[: least + extra + 1, layer].argmin())
    return copies


def _knapsack(levels: FloatArray) -> tuple[FloatArray, IntArray]:
    """Lowest sum of ``levels [M, L]`` for each total of copies; the choice of each layer.

    Returns ``best [C]`` and ``choice [L, C]``: copies that the layer takes when the layers up to it
    have that total.
    """
    steps, num_layers = levels.shape
    size = (steps - 1) * num_layers + 1
    best = np.zeros(size)
    choice = np.zeros((num_layers, size), dtype=np.int64)
    for layer in range(num_layers):
        options = np.full((steps, size), np.inf)
        for step in range(steps):
            options[step, step:] = best[: size - step] + levels[step, layer]
        choice[layer] = options.argmin(axis=0)
        best = options.min(axis=0)
    return best, choice

# SPDX-License-Identifier: Apache-2.0
"""How many copies each layer gets: an exact multiple-choice knapsack over the layers' curves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.placement.curves import Curves
from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.problem import Problem

IntArray = NDArray[np.int64]


def choose_copies(
    curves: Curves, problem: Problem, options: PlanOptions, most: int | None = None
) -> IntArray:
    """Copies ``[L]`` within the limits.

    Free copies: the fewest in total with which the sum of the levels is within
    ``options.tolerance`` of the mean. Otherwise the lowest sum of the levels, ties to fewer.
    ``most`` is a further limit on the total. Raises ValueError if the copies that fewer heads
    than ranks make unavoidable are over a limit.
    """
    least = max(problem.ranks - problem.heads, 0)
    per_layer, total = limits(problem, options, least, most)
    levels = np.minimum.accumulate(curves.levels[least : per_layer + 1], axis=0)
    best, choice = _knapsack(levels, total - least * problem.layers)
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


def limits(
    problem: Problem, options: PlanOptions, least: int, most: int | None = None
) -> tuple[int, int]:
    """Most copies in a layer and in total (at most ``most``); ``least`` per layer must be.

    Raises ValueError if that is impossible.
    """
    per_layer = problem.ranks - 1
    if options.max_copies_per_layer is not None:
        per_layer = min(per_layer, options.max_copies_per_layer)
    total = per_layer * problem.layers
    if options.max_extra_bytes is not None and problem.slice_bytes > 0.0:
        total = min(total, int(options.max_extra_bytes // problem.slice_bytes))
    if options.max_copies_per_rank is not None:
        total = min(total, options.max_copies_per_rank * problem.ranks)
    if most is not None:
        total = min(total, most)
    if per_layer < least or total < least * problem.layers:
        raise ValueError(
            f"the limits on copies cannot be met: {problem.heads} heads on {problem.ranks} ranks "
            f"need {least} copies in every layer ({least * problem.layers} in all)"
        )
    return per_layer, total


def _knapsack(levels: FloatArray, budget: int) -> tuple[FloatArray, IntArray]:
    """Lowest sum of ``levels [M, L]`` for each total of copies; the choice of each layer.

    Returns ``best [C]`` and ``choice [L, C]``: copies that the layer takes when the layers up to it
    have that total.
    """
    steps, num_layers = levels.shape
    size = min(budget, (steps - 1) * num_layers) + 1
    best = np.zeros(size)
    choice = np.zeros((num_layers, size), dtype=np.int64)
    for layer in range(num_layers):
        options = np.full((steps, size), np.inf)
        for step in range(min(steps, size)):
            options[step, step:] = best[: size - step] + levels[step, layer]
        choice[layer] = options.argmin(axis=0)
        best = options.min(axis=0)
    return best, choice

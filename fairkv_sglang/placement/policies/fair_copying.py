# SPDX-License-Identifier: Apache-2.0
"""``fair_copying``: few copies with free shares, chosen per layer by modelled step time.

The idea of copying the heads that need most memory is FairKV's (arXiv 2502.15804); free
shares replace its equal split of the batch.
"""

from __future__ import annotations

import numpy as np

from fairkv_sglang.placement.curves import Curves, layer_curves
from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.problem import Problem


def fair_copying(problem: Problem, options: PlanOptions) -> FloatArray:
    """Shares ``[L, R, H]``.

    Free copies (``problem.lane`` = 0): the fewest copies over all layers such that the sum over
    layers of the fullest rank is at most ``options.tolerance`` times the mean. Otherwise: the
    lowest step cost, ties to fewer copies.
    """
    curves = layer_curves(problem)
    copies = choose_copies(curves, problem, options)
    return np.stack([curves.build(layer, int(copies[layer])) for layer in range(problem.layers)])


def choose_copies(
    curves: Curves, problem: Problem, options: PlanOptions
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Copies ``[L]`` for each layer within the limits."""
    levels = np.minimum.accumulate(curves.levels, axis=0)
    exists = np.isfinite(curves.levels)
    least = exists.argmax(axis=0)
    most = len(levels) - 1
    if options.max_copies_per_layer is not None:
        most = min(most, options.max_copies_per_layer)
    limit = np.maximum(most, least)
    layers = np.arange(problem.layers)
    budget = np.inf
    if options.max_extra_bytes is not None and problem.slice_bytes > 0:
        budget = options.max_extra_bytes // problem.slice_bytes
    goal = -np.inf
    if problem.lane <= 0.0:
        goal = problem.costs.sum() / problem.ranks * options.tolerance
    copies: np.ndarray[tuple[int], np.dtype[np.int64]] = least.astype(np.int64)
    # Steepest step first: per copy, the largest fall of the level over any number of copies.
    while levels[copies, layers].sum() > goal:
        best_gain, best = 0.0, (-1, 0)
        for layer in layers:
            here = int(copies[layer])
            room = int(min(limit[layer] - here, budget - copies.sum()))
            for step in range(1, room + 1):
                gain = (levels[here, layer] - levels[here + step, layer]) / step
                if gain > best_gain * (1 + 1e-9) and gain > 1e-9 * levels[here, layer]:
                    best_gain, best = gain, (int(layer), step)
        if best[0] < 0:
            break
        copies[best[0]] += best[1]
    # A smaller number of copies may have the same level; only numbers with a plan can be built.
    for layer in layers:
        column = curves.levels[: copies[layer] + 1, layer]
        copies[layer] = int(column.argmin())
    return copies

# SPDX-License-Identifier: Apache-2.0
"""``fair_copying``: few copies with free shares, chosen over all layers by modelled step time.

The idea of copying the heads that need most memory is FairKV's (arXiv 2502.15804); free
shares replace its equal split of the batch.
"""

from __future__ import annotations

import numpy as np

from fairkv_sglang.placement.choose import choose_copies
from fairkv_sglang.placement.curves import Curves, layer_curves
from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.policies.contiguous import contiguous
from fairkv_sglang.placement.problem import Problem
from fairkv_sglang.placement.spare import add_spares
from fairkv_sglang.placement.stay import stay_home
from fairkv_sglang.placement.totals import copies_of_ranks, even_totals


def fair_copying(problem: Problem, options: PlanOptions) -> FloatArray:
    """Shares ``[L, R, H]``.

    Free copies (``problem.lane`` = 0): the fewest copies over all layers such that the sum over
    layers of the fullest rank is at most ``options.tolerance`` times the mean. Otherwise: the
    lowest step cost, ties to fewer copies. With scenarios (samples of requests, or a spread) spare
    copies are added where requests differ from the mean, see ``spare.py``.
    """
    curves = layer_curves(problem)
    most: int | None = None
    while True:
        shares = _build(problem, options, curves, most)
        shares = _not_worse_than_contiguous(problem, options, shares)
        shares = stay_home(problem, options, shares)
        shares = add_spares(problem, shares, options, most)
        limit = options.max_copies_per_rank
        if limit is None:
            return shares
        held = copies_of_ranks(even_totals(problem, shares, even_copies=True))
        if held.max() <= limit + 1e-9:
            return shares
        over = int(np.ceil(held.max() - limit - 1e-9))
        most = int((shares > 0).sum()) - problem.layers * problem.heads - over


def _build(problem: Problem, options: PlanOptions, curves: Curves, most: int | None) -> FloatArray:
    """Chosen layers, built; where a tree's bound is out of reach the choice is made again."""
    while True:
        copies = choose_copies(curves, problem, options, most)
        shares = np.stack([curves.build(layer, int(n)) for layer, n in enumerate(copies)])
        layers = np.arange(problem.layers)
        level = problem.rank_costs(shares).max(axis=1)
        above = level > curves.levels[copies, layers] * (1 + 1e-6)
        if not above.any():
            return shares
        curves.levels[copies[above], layers[above]] = level[above]


def _not_worse_than_contiguous(
    problem: Problem, options: PlanOptions, shares: FloatArray
) -> FloatArray:
    """Take contiguous layers where they are lower, which a heuristic curve cannot exclude."""
    if problem.heads < problem.ranks:
        return shares
    plain = contiguous(problem, options)
    lower = problem.rank_costs(plain).max(axis=1) < problem.rank_costs(shares).max(axis=1)
    return np.where(lower[:, None, None], plain, shares)

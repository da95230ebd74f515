# SPDX-License-Identifier: Apache-2.0
"""``fair_copying``: few copies with free shares, chosen over all layers by modelled step time.

The idea of copying the heads that need most memory is FairKV's (arXiv 2502.15804); free
shares replace its equal split of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.policies.base import POLICIES, Copying
from fairkv_sglang.placement.policies.contiguous import Contiguous
from fairkv_sglang.placement.solver.choose import choose_copies
from fairkv_sglang.placement.solver.curves import layer_curves
from fairkv_sglang.placement.solver.lane_search import MAX_RANKS
from fairkv_sglang.placement.solver.problem import Problem
from fairkv_sglang.placement.solver.slots import within_slots
from fairkv_sglang.placement.solver.spare import add_spares
from fairkv_sglang.placement.solver.stay import stay_home


@POLICIES.register
@dataclass(frozen=True)
class FairCopying(Copying):
    """Few copies with free shares, chosen over all layers by modelled step time."""

    name: ClassVar[str] = "fair_copying"
    summary: ClassVar[str] = "copies with free shares, chosen over all layers by step cost"

    def place(self, problem: Problem, options: PlanOptions) -> FloatArray:
        """Shares ``[L, R, H]``.

        Free copies (``problem.lane`` = 0): the fewest copies over all layers such that the sum over
        layers of the fullest rank is at most ``options.tolerance`` times the mean. Otherwise: the
        lowest step cost, ties to fewer copies. With scenarios (samples of requests, or a spread)
        spare copies are added where requests differ from the mean (``solver/spare.py``). Layers
        with more lanes on a rank than it has slots, or all where slots are paid for, are made as in
        ``solver/slots.py``.
        """
        options = self.limited(options)
        if options.paid and problem.ranks <= MAX_RANKS:
            shares = within_slots(problem, options, Contiguous().place(problem, options))
        else:
            shares = within_slots(problem, options, _build(problem, options))
            shares = stay_home(problem, options, shares)
        return add_spares(problem, shares, options)


def _build(problem: Problem, options: PlanOptions) -> FloatArray:
    """Chosen layers, built; where a tree's bound is out of reach the choice is made again."""
    curves, layers = layer_curves(problem), np.arange(problem.layers)
    while True:
        copies = choose_copies(curves, problem, options)
        shares = np.stack([curves.build(layer, int(n)) for layer, n in enumerate(copies)])
        level = problem.rank_costs(shares).max(axis=1)
        above = level > curves.levels[copies, layers] * (1 + 1e-6)
        if not above.any():
            return shares
        curves.levels[copies[above], layers[above]] = level[above]

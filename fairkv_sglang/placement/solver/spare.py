# SPDX-License-Identifier: Apache-2.0
"""Spare copies: room for the router when requests differ from the expected loads.

A plan with the fewest copies balances the expectation exactly and has no freedom left: its trees
cannot lend load to each other. Lanes are added one at a time, over all layers the one that lowers
the mean level over the scenarios most (``lane_search.py``), until it is within the tolerance of the
ideal (free copies) or no lane pays for its weight slice any more. Where all slots of a rank are
used a lane may take the place of another copy.
"""

from __future__ import annotations

import numpy as np

from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.solver.lane_search import MAX_RANKS, Support, balanced_shares
from fairkv_sglang.placement.solver.problem import Problem

_SCENARIOS = 32
# Variation added to samples and requests in a scenario; by replay of held-out prompts
# (bench/placement.py), where more of either bought nothing.
_UNSEEN, _UNSEEN_COSTED = 0.2, 0.15
_GROUP = 4
_TOLERANCE = 1.01  # free copies
_MIN_GAIN = 1e-4
_DEARER = 1.01


def add_spares(problem: Problem, shares: FloatArray, options: PlanOptions) -> FloatArray:
    """Shares ``[L, R, H]`` with spare copies added; unchanged without scenarios.

    Spare copies are not bound to R - 1 per layer, but to the limit of ``options``. For more than
    MAX_RANKS ranks none are added, and ``problem.notes`` says so.
    """
    scenarios = make_scenarios(problem, options)
    if scenarios is None or problem.ranks == 1:
        return shares
    if problem.ranks > MAX_RANKS:
        problem.notes["spare_copies"] = f"none: not available above {MAX_RANKS} ranks"
        return shares
    most = options.most_copies(problem.heads * (problem.ranks - 1))
    layers = [
        Support(
            shares[index] > 0,
            problem.costs[index],
            scenarios[:, index],
            problem.lane,
            options.slots(problem.heads),
            most,
            problem.batch,
            _DEARER,
        )
        for index in range(problem.layers)
    ]
    ideal = float(scenarios.sum(axis=(1, 2)).mean()) / problem.ranks
    goal = ideal * _TOLERANCE if problem.lane <= 0.0 and not options.paid else -np.inf
    nexts = [layer.next_step() for layer in layers]
    while sum(layer.level for layer in layers) > goal:
        gains = [gain for gain, _ in nexts]
        index = int(np.argmax(gains))
        if gains[index] <= _MIN_GAIN * layers[index].level:
            break
        layers[index].take(nexts[index][1])
        nexts[index] = layers[index].next_step()
    problem.notes["spare_copies"] = int(
        sum(layer.served.sum() for layer in layers) - (shares > 0).sum()
    )
    out = shares.copy()
    for index, layer in enumerate(layers):
        if (layer.served != (shares[index] > 0)).any():
            out[index] = balanced_shares(problem.costs[index], layer.served, problem.lane)
    return out


def make_scenarios(problem: Problem, options: PlanOptions) -> FloatArray | None:
    """Costs ``[S, L, H]`` of batches that differ from the mean; None if nothing is known of them.

    With free copies each sampled request stands for a batch of its like, the widest variation;
    where a copy has its price a scenario is the mean of a few requests, closer to a real batch.
    Log-normal factors per head with the coefficient of variation ``options.spread`` stand
    for what the samples do not show; without samples they are all there is.
    """
    samples, spread = problem.samples, options.spread
    rng = np.random.default_rng(0)
    if samples is None or len(samples) < 2:
        if spread <= 0.0:
            return None
        chosen = np.repeat(problem.costs[None], _SCENARIOS, axis=0)
    elif problem.lane > 0.0:
        spread = spread or _UNSEEN_COSTED
        chosen = samples[rng.integers(len(samples), size=(_SCENARIOS, _GROUP))].mean(axis=1)
    else:
        spread = spread or _UNSEEN
        many = np.repeat(samples, max(_SCENARIOS // len(samples), 1), axis=0)
        pick = np.rint(np.linspace(0, len(many) - 1, min(len(many), _SCENARIOS)))
        chosen = many[pick.astype(np.int64)]
    noise = rng.standard_normal(chosen.shape)
    sigma = float(np.sqrt(np.log1p(spread**2)))
    drawn: FloatArray = chosen * np.exp(sigma * noise - 0.5 * sigma**2)
    return drawn

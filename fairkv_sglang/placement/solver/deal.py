# SPDX-License-Identifier: Apache-2.0
"""Which rank takes which part of a layer: free for step time, decisive for memory and for how many
rows stay at home.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from fairkv_sglang.placement.homes import home_table
from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.placement.solver.problem import Problem

EVEN, EVENER = 1.01, 1.005
"""The fullest rank's tokens: over the mean, even enough; else over the evenest that was found."""
EVEN_SERVING = 1.05
"""The same while serving, where every lane that changes ranks has to drain."""
_AIM = 0.85  # of the way from the mean to even enough; from there on tokens have a price
_PRICES = (0.0, *(2.0**n for n in range(-1, 19)))


def deal(
    problem: Problem,
    plans: Sequence[Sequence[FloatArray]],
    lanes: NDArray[np.bool_] | None = None,
) -> FloatArray:
    """Shares ``[L, R, H]``: each layer has one of ``plans[l]``, each ``[R, H]``, ranks permuted.

    Most rows at home, then fewest twins, with even token totals of the ranks, as a rank's pages
    bound its capacity. Layers are settled one after the other, each with the best assignment for
    what the others give the ranks; tokens above the mean have a price that rises until no rank
    has more than ``EVEN`` times the mean. Where that is not reached, largest parts go to the
    emptiest ranks first and the price falls again; of all that came by, the one with most rows at
    home is taken that is within ``EVEN``, or ``EVENER`` of the evenest.

    With ``lanes [L, R, H]``, those of a running server, most rows stay on them instead, and totals
    within ``EVEN_SERVING`` are even enough.
    """
    home = home_table(problem.heads, problem.ranks)
    homes = [home] * problem.layers if lanes is None else lanes
    even = EVEN if lanes is None else EVEN_SERVING
    mean = float(problem.tokens.sum()) / problem.ranks
    parts = []  # of each layer and plan: value [parts, ranks] and tokens [parts]
    for layer, tokens, near in zip(plans, problem.tokens, homes, strict=True):
        # heads without tokens count a little: their weights stay at home, too
        rows = tokens + max(1e-6 * float(tokens.mean()), 1e-12)
        parts.append([(_value(plan, rows, near), (plan * tokens).sum(axis=1)) for plan in layer])
    ranks = np.arange(problem.ranks)
    given = np.stack([layer[0][1] for layer in parts])  # tokens
    order = np.argsort(-np.ptp(given, axis=1), kind="stable")
    chosen = [(0, ranks)] * problem.layers
    states = []
    for price in (None, *_PRICES, np.inf, *_PRICES[::-1]):
        if price == np.inf:  # too uneven: anew without regard to homes, then back to them
            given[:] = 0.0
        for index in order if price is not None else ():
            base = given.sum(axis=0) - given[index] - (1 + _AIM * (even - 1)) * mean
            best = -np.inf
            for number, (value, tokens) in enumerate(parts[index]):
                over = base[None] + tokens[:, None]
                if price == np.inf:
                    score = -(over**2)
                else:
                    score = value - price * np.maximum(over, 0.0) ** 2 / max(mean, 1e-300)
                part = linear_sum_assignment(-score.T)[1]
                total = float(score[part, ranks].sum())
                if total > best:
                    best, chosen[index], given[index] = total, (number, part), tokens[part]
        top = float(given.sum(axis=0).max())
        picked = [layer[n][0][part, ranks] for layer, (n, part) in zip(parts, chosen, strict=True)]
        states.append((top, float(np.sum(picked)), list(chosen)))
        if top <= even * mean and 1 < len(states) <= 1 + len(_PRICES):
            break
    evenest = min(state[0] for state in states)
    limit = even * mean if evenest <= even * mean else EVENER * evenest
    found = max((state for state in states if state[0] <= limit), key=lambda state: state[1])[2]
    return np.stack([layer[n][part] for layer, (n, part) in zip(plans, found, strict=True)])


def _value(plan: FloatArray, rows: FloatArray, home: NDArray[np.bool_]) -> FloatArray:
    """``[parts, ranks]``: rows at home, and a little for lanes that need no twin."""
    lanes = (plan > 0).sum(axis=1)[:, None]
    twins = np.where(((plan > 0)[:, None] == home[None]).all(axis=2), 0, lanes)
    value: FloatArray = np.einsum("ph,rh->pr", plan * rows, home) - 1e-7 * rows.sum() * twins
    return value

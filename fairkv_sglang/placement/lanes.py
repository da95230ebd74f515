# SPDX-License-Identifier: Apache-2.0
"""What given lanes cost under given loads, and how many spare lanes to have."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from fairkv_sglang.placement.cost import CostModel
from fairkv_sglang.placement.make import make_plan
from fairkv_sglang.placement.options import FloatArray, check_loads

TYPICAL_SKEW = 0.88
"""Standard deviation of the logarithm of a head's load within its layer, mean over layers, median
of 20 collected profiles with a floor of 0.2 (docs/placement.md)."""
_WORTH = 1.005  # another slot must bring so much


def modelled_step(
    served: ArrayLike, loads: ArrayLike, cost: CostModel | None = None, slots: int | None = None
) -> float:
    """Modelled decode time of lanes with the best shares on them: sum over layers of fullest ranks.

    One linear program (HiGHS): shares of each head sum to 1, no rank of a layer is above its level.

    Args:
        served: ``[L, R, H]``, whether the rank serves the head.
        loads: Expected kept tokens ``[L, H]``.
        cost: Turns tokens into cost; without it lanes cost nothing and the result is in tokens.
        slots: Lane slots of each (layer, rank) that are paid for whether used or not; None: lanes
            are paid for.

    Raises:
        ValueError: in one line, if shapes do not fit or a head is served by no rank.
    """
    lanes = np.asarray(served, dtype=bool)
    tokens = check_loads(loads, lanes.shape[1] if lanes.ndim == 3 else 1)
    if lanes.ndim != 3 or (lanes.shape[0], lanes.shape[2]) != tokens.shape:
        raise ValueError(f"lanes {lanes.shape} do not fit loads {tokens.shape}")
    if not lanes.any(axis=1).all():
        raise ValueError("every head needs a rank that serves it")
    layers, ranks, heads = lanes.shape
    costs = tokens if cost is None else cost.head_cost(tokens)
    lane = 0.0 if cost is None else cost.lane_cost
    paid = lanes.sum(axis=2) if slots is None else np.full((layers, ranks), slots)
    scale = max(float(costs.max()), lane, 1e-300)
    layer, rank, head = np.nonzero(lanes)
    shares = np.arange(len(layer))
    rows = np.arange(layers * ranks)
    # columns: the shares of all lanes, then the levels of the layers
    size = len(shares) + layers
    whole = coo_matrix(
        (np.ones(len(shares)), (layer * heads + head, shares)), (layers * heads, size)
    )
    used = coo_matrix(
        (
            np.concatenate([costs[layer, head] / scale, -np.ones(layers * ranks)]),
            (
                np.concatenate([layer * ranks + rank, rows]),
                np.concatenate([shares, len(shares) + rows // ranks]),
            ),
        ),
        (layers * ranks, size),
    )
    result = milp(
        np.repeat([0.0, 1.0], [len(shares), layers]),
        constraints=(
            LinearConstraint(whole.tocsr(), 1.0, 1.0),
            LinearConstraint(used.tocsr(), -np.inf, -lane / scale * paid.ravel()),
        ),
        bounds=Bounds(0.0, np.inf),
    )
    levels = np.asarray(result.x, dtype=np.float64)[len(shares) :]
    return float(levels.sum()) * scale


def choose_spare(loads: ArrayLike, tp_size: int, cost: CostModel, *, paid: bool) -> int:
    """Spare lanes of each (layer, rank) beside its home heads: the fewest after which another one
    takes less than 0.5 % off the modelled decode time.

    At least 1 (without a free slot nothing can move) where there are several ranks, and at most as
    many as there are other heads.

    Args:
        loads: Expected kept tokens ``[L, H]``.
        tp_size: Ranks.
        cost: Load model.
        paid: A slot costs a lane, used or not.

    Raises:
        ValueError: in one line, for loads that cannot be placed.
    """
    tokens = check_loads(loads, tp_size)
    heads = int(tokens.shape[1])
    home = -(-heads // tp_size)
    most = heads - home

    def step(spare: int) -> float:
        plan = make_plan("fair_copying", tokens, tp_size, cost, max_lanes=home + spare, paid=paid)
        return float(plan.info["step_cost"])

    chosen = min(most, 1)
    best = step(chosen) if most > 1 else 0.0
    for spare in range(chosen + 1, most + 1):
        now = step(spare)
        if now * _WORTH > best:
            break
        chosen, best = spare, now
    return chosen


def typical_skew(layers: int, heads: int) -> FloatArray:
    """Factors ``[L, H]``, 1 on average in each layer, of heads as uneven as heads usually are.

    Log-normal of TYPICAL_SKEW; the same in every process.
    """
    drawn = np.random.default_rng(0).standard_normal((layers, heads))
    drawn -= drawn.mean(axis=1, keepdims=True)
    drawn /= np.maximum(drawn.std(axis=1, keepdims=True), 1e-9)
    factors = np.exp(TYPICAL_SKEW * drawn)
    skew: FloatArray = factors / factors.mean(axis=1, keepdims=True)
    return skew

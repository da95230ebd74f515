# SPDX-License-Identifier: Apache-2.0
"""What given lanes cost under given loads."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from fairkv_sglang.placement.cost import CostModel
from fairkv_sglang.placement.options import check_loads


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

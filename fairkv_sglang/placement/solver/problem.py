# SPDX-License-Identifier: Apache-2.0
"""What a policy has to place: costs per head and per lane, and how results are measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fairkv_sglang.placement.options import FloatArray


@dataclass(frozen=True)
class Problem:
    """One placement problem.

    tokens: ``[L, H]`` expected kept tokens. costs: ``[L, H]`` the same in cost units for the
    whole batch. lane: cost of a head served at all (0: copies are free). slice_bytes: weight bytes
    of a lane. fixed: cost of every rank in a layer whatever it serves. samples: ``[N, L, H]``
    costs as if the whole batch were like one sampled request. batch: requests served at a time.
    notes: what a policy wants to say about its run (solver status, gap); ends up in ``Plan.info``.
    """

    tokens: FloatArray
    costs: FloatArray
    ranks: int
    lane: float
    slice_bytes: float
    samples: FloatArray | None = None
    fixed: float = 0.0
    batch: float = 32.0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return int(self.costs.shape[0])

    @property
    def heads(self) -> int:
        return int(self.costs.shape[1])

    def rank_costs(self, shares: FloatArray) -> FloatArray:
        """``[L, R]`` cost of shares ``[L, R, H]``."""
        return rank_loads(shares, self.costs[:, None], self.lane)


def rank_loads(shares: FloatArray, costs: FloatArray, lane: float) -> FloatArray:
    """Cost ``[..., R]`` of shares ``[..., R, H]`` for costs of heads that broadcast to them."""
    loads: FloatArray = (shares * costs).sum(axis=-1) + lane * (shares > 0).sum(axis=-1)
    return loads


def lower_bound(costs: FloatArray, ranks: int, lane: float) -> FloatArray:
    """Closed lower bound ``[L]`` of the fullest rank for costs ``[L, H]`` and any copies.

    At level T a head of cost a needs at least ``a / (T - lane)`` lanes, so T is too low unless
    ``sum(a) + lane * max(R, sum(ceil(a / (T - lane)))) <= R * T``; the smallest such T is found by
    bisection. With free copies it is the mean.
    """
    total: FloatArray = costs.sum(axis=1)
    heads = costs.shape[1]
    simple: FloatArray = (total + lane * max(heads, ranks)) / ranks
    if lane <= 0.0:
        return simple
    low, high = simple, total + lane * heads

    def fits(level: FloatArray) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        room = np.maximum(level - lane, 1e-300)[:, None]
        lanes = np.maximum(np.ceil(costs / room - 1e-9), 1.0).sum(axis=1)
        return np.asarray(total + lane * np.maximum(lanes, ranks) <= ranks * level * (1 + 1e-12))

    done = fits(low)
    for _ in range(60):
        middle = 0.5 * (low + high)
        ok = fits(middle)
        high = np.where(ok, middle, high)
        low = np.where(ok, low, middle)
    return np.where(done, simple, low)

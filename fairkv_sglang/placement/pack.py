# SPDX-License-Identifier: Apache-2.0
"""Level-by-copies curves for layers with many heads: pack whole heads, then split few.

Whole heads are dealt out largest first to the emptiest rank (LPT: at most 4/3 - 1/(3R) of the
best packing without copies; R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969),
improved by moves and swaps, and for a series of target levels the ranks above the target shed
their excess to the ranks below it, one copy each time. The wrap-around rule closes the series:
it reaches the bound with at most R - 1 copies.
"""

from __future__ import annotations

import numpy as np

from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.placement.wrap import group_bound, wrap

_TARGETS = 12
_EPS = 1e-9


class LargeCurves:
    """Level by number of copies for every layer of ``loads [L, H]``, as SmallCurves."""

    def __init__(self, loads: FloatArray, ranks: int, lane: float) -> None:
        num_layers = loads.shape[0]
        self.levels = np.full((ranks, num_layers), np.inf)
        self._shares: list[dict[int, FloatArray]] = []
        for layer in range(num_layers):
            curve = _layer_curve(loads[layer], ranks, lane)
            self._shares.append({copies: shares for copies, (_, shares) in curve.items()})
            for copies, (level, _) in curve.items():
                self.levels[copies, layer] = level

    def build(self, layer: int, copies: int) -> FloatArray:
        """Shares ``[R, H]`` of one layer with exactly ``copies`` copies."""
        return self._shares[layer][copies]


def level_of(loads: FloatArray, shares: FloatArray, lane: float) -> float:
    """Load of the fullest rank for ``loads [H]`` and ``shares [R, H]``."""
    return float((shares @ loads + lane * (shares > 0).sum(axis=1)).max())


def pack(loads: FloatArray, ranks: int, lane: float) -> list[list[int]]:
    """Whole heads of ``loads [H]`` on ranks, H >= ranks, every rank at least one; no copies."""
    cost = [float(x) + lane for x in loads]
    order = [int(i) for i in np.argsort(-loads, kind="stable")]
    bins: list[list[int]] = [[] for _ in range(ranks)]
    used = [0.0] * ranks
    for position, head in enumerate(order):
        left = len(order) - position
        empty = [r for r in range(ranks) if not bins[r]]
        choice = empty if len(empty) >= left else range(ranks)
        rank = min(choice, key=lambda r: (used[r], len(bins[r]), r))
        bins[rank].append(head)
        used[rank] += cost[head]
    _improve(bins, used, cost)
    return bins


def _improve(bins: list[list[int]], used: list[float], cost: list[float]) -> None:
    """Moves and swaps between the fullest rank and the others while the fullest gets lower."""
    for _ in range(4 * len(cost)):
        top = max(range(len(bins)), key=lambda r: (used[r], -r))
        best: tuple[float, int, int, int] | None = None
        for other in range(len(bins)):
            diff = used[top] - used[other]
            if other == top or diff <= _EPS * used[top]:
                continue
            mine = np.array([cost[h] for h in bins[top]])
            theirs = np.array([cost[h] for h in bins[other]] + [0.0])
            gain = mine[:, None] - theirs[None, :]
            if len(bins[top]) == 1:
                gain[:, -1] = 0.0  # a move would leave the rank without a head
            # the larger of the two after the exchange
            after = np.maximum(used[top] - gain, used[other] + gain)
            index = int(after.argmin())
            level = float(after.flat[index])
            if level < used[top] * (1 - 1e-7) and (best is None or level < best[0]):
                best = (level, other, index // len(theirs), index % len(theirs))
        if best is None:
            return
        _, other, i, j = best
        give = bins[top].pop(i)
        used[top] -= cost[give]
        used[other] += cost[give]
        if j < len(bins[other]):
            back = bins[other].pop(j)
            used[other] -= cost[back]
            used[top] += cost[back]
            bins[top].append(back)
        bins[other].append(give)


def _layer_curve(
    loads: FloatArray, ranks: int, lane: float
) -> dict[int, tuple[float, FloatArray]]:
    heads = len(loads)
    curve: dict[int, tuple[float, FloatArray]] = {}

    def offer(shares: FloatArray) -> None:
        copies = int((shares > 0).sum()) - heads
        level = level_of(loads, shares, lane)
        if copies < ranks and (copies not in curve or level < curve[copies][0]):
            curve[copies] = (level, shares)

    offer(wrap(loads, ranks, lane))
    if heads < ranks:
        return curve
    base = np.zeros((ranks, heads))
    for rank, members in enumerate(pack(loads, ranks, lane)):
        base[rank, members] = 1.0
    offer(base)
    top = level_of(loads, base, lane)
    floor = group_bound(float(loads.sum()), heads, 1, lane) / ranks
    for step in range(_TARGETS):
        target = floor + (top - floor) * (1 - step / _TARGETS) ** 2
        shares = _shed(loads, base, lane, target)
        if shares is not None:
            offer(shares)
    return curve


def _shed(loads: FloatArray, base: FloatArray, lane: float, target: float) -> FloatArray | None:
    """Split heads of ranks above ``target`` into ranks below it; None if room runs out."""
    shares = base.copy()
    used = shares @ loads + lane * (shares > 0).sum(axis=1)
    limit = target * (1 + _EPS)
    for _ in range(3 * len(used)):
        top = int(used.argmax())
        if used[top] <= limit:
            return shares
        excess = used[top] - target
        room = target - used - lane
        enough = np.where(room >= excess, room, np.inf)
        to = int(enough.argmin()) if np.isfinite(enough).any() else int(room.argmax())
        if room[to] <= _EPS * target:
            return None
        piece = loads * shares[top]
        candidates = (shares[top] > 0) & (shares[to] == 0)
        if not candidates.any():
            return None
        head = int(np.where(candidates, piece, -1.0).argmax())
        amount = min(excess, room[to], piece[head] * (1 - 1e-6))
        if amount <= 0.0:
            return None
        shares[top, head] -= amount / loads[head]
        shares[to, head] = amount / loads[head]
        used[top] -= amount
        used[to] += amount + lane
    return None

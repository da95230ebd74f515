# SPDX-License-Identifier: Apache-2.0
"""Fill a group of ranks with a group of heads, splitting heads on the borders.

McNaughton's wrap-around rule (R. McNaughton, "Scheduling with deadlines and loss functions",
Management Science 6, 1959): fill rank after rank up to a level and split the head that crosses
the border. ``k`` ranks need at most ``k - 1`` splits. With a fixed cost per lane (the weight
slice) the level of ``n`` heads on ``k`` ranks is at least ``(sum + lane * (n + k - 1)) / k``
as long as the group is connected, and the order of the heads decides whether that is reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import numpy as np

from fairkv_sglang.placement.options import FloatArray

_EPS = 1e-9


def group_bound(total: float, heads: int, ranks: int, lane: float) -> float:
    """Lowest possible level of ``heads`` heads of ``total`` load that join ``ranks`` ranks."""
    return (total + lane * (heads + ranks - 1)) / ranks


def wrap(loads: FloatArray, ranks: int, lane: float) -> FloatArray:
    """Shares ``[ranks, n]`` of ``n`` heads on ``ranks`` ranks with the lowest level found.

    ``loads``: load of each head, the same unit as ``lane`` (cost of serving a head at all).
    """
    count = len(loads)
    if ranks == 1:
        return np.ones((1, count))
    total = float(loads.sum())
    if total <= 0.0:
        return _idle(count, ranks)
    bound = group_bound(total, count, ranks, lane)
    best: FloatArray | None = None
    best_level = np.inf
    for order in _orders(loads):
        level, shares = _fill_order(loads, order, ranks, lane, bound, best_level)
        if shares is not None and level < best_level * (1 - _EPS):
            best, best_level = shares, level
        if best_level <= bound * (1 + 1e-6):
            break
    if best is None:  # rounding only: every order fits one lane above the bound
        best = np.full((ranks, count), 1.0 / ranks)
    return best


def _orders(loads: FloatArray) -> Iterator[tuple[int, ...]]:
    count = len(loads)
    descending = tuple(int(i) for i in np.argsort(-loads, kind="stable"))
    if count <= 4:
        yield from permutations(descending)
        return
    yield descending
    # Large heads between small ones: borders then fall into heads that can be cut anywhere.
    half = count // 2
    large, small = descending[:half], descending[half:][::-1]
    mixed: list[int] = []
    for index in range(len(small)):
        mixed.append(small[index])
        if index < half:
            mixed.append(large[index])
    yield tuple(mixed)
    yield tuple(reversed(mixed))
    yield descending[1:] + descending[:1]
    for shift in range(2, min(count, 8)):
        yield descending[shift:] + descending[:shift]
        yield tuple(mixed[shift:] + mixed[:shift])


def _fill_order(
    loads: FloatArray,
    order: tuple[int, ...],
    ranks: int,
    lane: float,
    bound: float,
    stop: float,
) -> tuple[float, FloatArray | None]:
    """Lowest level at which the wrap-around in this order fits; nothing if not below ``stop``."""
    shares = _fill(loads, order, ranks, lane, bound)
    if shares is not None:
        return bound, shares
    low, high = bound, min(stop, (bound + lane) * (1 + 1e-6))
    shares = _fill(loads, order, ranks, lane, high)
    if shares is None:
        return high, None
    for _ in range(30):
        if high - low <= 1e-4 * high:
            break
        middle = 0.5 * (low + high)
        attempt = _fill(loads, order, ranks, lane, middle)
        if attempt is None:
            low = middle
        else:
            shares, high = attempt, middle
    return high, shares


def _fill(
    loads: FloatArray, order: tuple[int, ...], ranks: int, lane: float, level: float
) -> FloatArray | None:
    """Wrap-around at ``level``; None if it does not fit."""
    shares = np.zeros((ranks, len(loads)))
    slack = level * _EPS
    rank, used = 0, 0.0
    for item in order:
        load = float(loads[item])
        left = load
        placed = False
        while not placed or left > slack:
            room = level - used - lane
            if room < -slack or (room <= slack and left > slack):
                rank, used = rank + 1, 0.0
                if rank >= ranks:
                    return None
                if level - lane <= slack and left > slack:
                    return None
                continue
            piece = min(left, max(room, 0.0))
            if left - piece <= slack:
                piece = left
            shares[rank, item] += piece / load if load > 0.0 else 1.0
            used += lane + piece
            left -= piece
            placed = True
    shares /= shares.sum(axis=0, keepdims=True)
    for empty in range(rank + 1, ranks):
        # Half of the largest piece: no rank gets above the level, and the group stays a forest.
        largest = int((shares * np.maximum(loads, _EPS)).argmax())
        donor, head = divmod(largest, len(loads))
        shares[donor, head] /= 2
        shares[empty, head] = shares[donor, head]
    return shares


def _idle(count: int, ranks: int) -> FloatArray:
    """Shares for heads without any load: one head per rank in turn, copies if there are fewer."""
    shares = np.zeros((ranks, count))
    for index in range(max(count, ranks)):
        shares[index % ranks, index % count] = 1.0
    shares /= shares.sum(axis=0, keepdims=True)
    return shares

# SPDX-License-Identifier: Apache-2.0
"""Integer budgets in proportion to shares, between a floor and a ceiling, with a fixed total."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def water_fill(share: npt.ArrayLike, total: int, low: int, high: int) -> IntArray:
    """x_i = clip(level * share_i, low, high) with the one level at which the x_i sum to ``total``.

    What the ceiling cuts off and what the floor adds is thereby spread over the heads in between in
    proportion to their shares. Heads of share 0 get more than the floor only once all others are
    full; then they rise together. Rounding: down, and the missing units to the largest remainders,
    first head first among equals.

    Args:
        share: [n], not negative.
        total: Wanted sum; clipped to what floors and ceilings allow.
        low, high: Floor and ceiling of every entry.

    Returns:
        int64 [n]; the sum is ``total`` (within [n * low, n * high]).
    """
    weight = np.asarray(share, dtype=np.float64)
    n = weight.size
    total = min(max(total, n * low), n * high)
    exact = np.clip(_level(weight, total, low, high), low, high)
    values = np.floor(exact).astype(np.int64)
    # Rounded so that noise in the last digits does not decide between equal remainders.
    remainder = np.round(exact - values, 6)
    order = np.argsort(-remainder, kind="stable")
    order = order[values[order] < high]
    values[order[: total - values.sum()]] += 1
    return values


def _level(
    weight: npt.NDArray[np.float64], total: int, low: int, high: int
) -> npt.NDArray[np.float64]:
    """level * weight for the level at which the clipped values sum to ``total``."""
    # A tiny weight instead of none: these heads are last in line, but do fill up in the end.
    mean = float(weight.mean())
    weight = np.maximum(weight, 1e-9 * mean) if mean > 0 else np.ones_like(weight)
    # The sum is piecewise linear in the level with kinks where a head leaves its floor or reaches
    # its ceiling: find the piece, then solve it.
    kinks = np.sort(np.concatenate([low / weight, high / weight]))
    first, last = 0, len(kinks) - 1  # sum at kinks[first] <= total <= sum at kinks[last]
    while last - first > 1:
        middle = (first + last) // 2
        if np.clip(kinks[middle] * weight, low, high).sum() <= total:
            first = middle
        else:
            last = middle
    full = high / weight <= kinks[first]
    rising = ~full & (low / weight <= kinks[first])
    rest = total - high * int(full.sum()) - low * int((~full & ~rising).sum())
    values = np.where(full, float(high), float(low))
    if rising.any():
        values[rising] = weight[rising] * (rest / weight[rising].sum())
    return values

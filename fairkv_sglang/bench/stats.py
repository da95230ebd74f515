# SPDX-License-Identifier: Apache-2.0
"""Medians with their spread, ratios of paired runs, and the order of runs in a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Spread = dict[str, float]
"""A median with what it was made from: quartiles and extremes of ``count`` values."""


def spread(values: Sequence[float]) -> Spread:
    """Spread of at least one finite value.

    Raises:
        ValueError: for no values, or values that are not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"a median needs at least one finite value, got {list(values)}")
    names = ("least", "quarter", "median", "three_quarters", "most")
    found = np.quantile(array, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return {**dict(zip(names, found, strict=True)), "count": array.size}


def show(figure: Spread, digits: int = 2) -> str:
    """``median [least..most]``; the median alone where there is nothing to compare."""
    text = f"{figure['median']:.{digits}f}"
    if figure["count"] < 2:
        return text
    return f"{text} [{figure['least']:.{digits}f}..{figure['most']:.{digits}f}]"


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Spread of ``values[i] / base[i]``: runs of the same round are compared, so that a slow phase
    of the machine hits both.

    Raises:
        ValueError: for lists of different length and for a base of 0.
    """
    if len(values) != len(base):
        raise ValueError(f"{len(values)} runs cannot be compared with {len(base)} in pairs")
    if any(x == 0 for x in base):
        raise ValueError("a run of the base has the value 0, there is no ratio")
    return spread([x / y for x, y in zip(values, base, strict=True)])


def rotated(items: Sequence[Item], round_index: int) -> list[Item]:
    """Order of a round: each item runs first, second, ... equally often over ``len(items)``
    rounds.
    """
    if not items:
        return []
    shift = round_index % len(items)
    return [*items[shift:], *items[:shift]]

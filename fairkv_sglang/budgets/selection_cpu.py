# SPDX-License-Identifier: Apache-2.0
"""The selections of `selection` in host memory, compiled by numba: one pass in place of a dozen.

Results are those of the torch code, which stays for devices and as the definition; tests compare.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numba.core import types

_SCORES = types.Array(types.float32, 2, "A", readonly=True)
_COUNTS = types.Array(types.int64, 1, "A", readonly=True)
_LOWEST = np.float32(-np.inf)


@nb.njit(inline="always")
def _sane(x):  # type: ignore[no-untyped-def]
    return x if x == x else _LOWEST


@nb.njit(
    types.Array(types.int64, 2, "C")(_SCORES, _COUNTS, types.int64, types.int64),
    cache=True,
    nogil=True,
)
def pick(scores, counts, prompt_len, width):  # type: ignore[no-untyped-def]
    """Kept positions `[n, width]`, ascending, then -1; see `selection.pick`."""
    n, m = scores.shape
    window = prompt_len - m
    indices = np.full((n, width), -1, dtype=np.int64)
    row = np.empty(m, dtype=np.float32)
    for i in range(n):
        keep = counts[i] - window
        for t in range(m):
            row[t] = _sane(scores[i, t])
        at = 0
        if keep >= m:
            for t in range(m):
                indices[i, t] = t
            at = m
        elif keep > 0:
            threshold = np.partition(row, m - keep)[m - keep]
            tied = keep
            for t in range(m):
                if row[t] > threshold:
                    tied -= 1
            for t in range(m):
                if row[t] > threshold or (row[t] == threshold and tied > 0):
                    if row[t] == threshold:
                        tied -= 1
                    indices[i, at] = t
                    at += 1
        for t in range(window):
            indices[i, at + t] = m + t
    return indices


@nb.njit(
    types.Array(types.int64, 1, "C")(_SCORES, types.int64, _COUNTS, types.int64),
    cache=True,
    nogil=True,
)
def pooled_counts(scores, total, order, floor):  # type: ignore[no-untyped-def]
    """Entries of each row, n * floor < total < n * M; see `selection`."""
    n, m = scores.shape
    rest = m - floor  # entries of a row that compete: all but its best
    flat = np.empty(n * rest, dtype=np.float32)
    row = np.empty(m, dtype=np.float32)
    for i in range(n):
        for t in range(m):
            row[t] = _sane(scores[i, t])
        flat[i * rest : (i + 1) * rest] = np.partition(row, rest)[:rest] if floor else row
    left = total - n * floor
    threshold = np.partition(flat, n * rest - left)[n * rest - left]
    counts = np.full(n, floor, dtype=np.int64)
    ties = np.zeros(n, dtype=np.int64)
    for i in range(n):
        above = 0
        for t in range(rest):
            value = flat[i * rest + t]
            if value > threshold:
                above += 1
            elif value == threshold:
                ties[i] += 1
        counts[i] += above
        left -= above
    for i in order:
        taken = min(left, ties[i])
        counts[i] += taken
        left -= taken
    return counts

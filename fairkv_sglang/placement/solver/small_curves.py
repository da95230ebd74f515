# SPDX-License-Identifier: Apache-2.0
"""Exact fewest-copies curve of layers with few heads, by dynamic programming over head sets.

Draw an edge between a head and each rank that serves it. Given the edges, the best shares are a
basic solution of a linear program, so the edges in use may be taken as a forest: a tree of ``n``
heads and ``k`` ranks has ``n + k - 1`` edges, ``k - 1`` of them copies. A layer with ``c`` trees
therefore has ``ranks - c`` copies, and its level is the largest over the trees of
``(sum + lane * (n + k - 1)) / k``. Fewest copies at a level = most trees at that level: a partition
of the heads into trees, found for all layers at once in ``O(3^H)`` vector operations.
"""

from __future__ import annotations

import numpy as np

from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.placement.solver.wrap import wrap

MAX_HEADS = 9


class SmallCurves:
    """Level by number of copies for every layer of ``loads [L, H]``, H <= MAX_HEADS.

    ``levels[m, l]`` is the lowest level of layer ``l`` with at most ``m`` copies as far as the
    tree bound goes; inf where ``m`` copies are too few to give every rank a head.
    """

    def __init__(self, loads: FloatArray, ranks: int, lane: float) -> None:
        self._loads, self._ranks, self._lane = loads, ranks, lane
        num_layers, heads = loads.shape
        full = (1 << heads) - 1
        trees = min(heads, ranks)
        sums = np.zeros((full + 1, num_layers))
        sizes = np.zeros(full + 1)
        for mask in range(1, full + 1):
            low = (mask & -mask).bit_length() - 1
            sums[mask] = sums[mask & (mask - 1)] + loads[:, low]
            sizes[mask] = sizes[mask & (mask - 1)] + 1
        # bound[j, mask, l]: level of the heads of `mask` as one tree over j ranks
        bound = np.full((ranks + 1, full + 1, num_layers), np.inf)
        for j in range(1, ranks + 1):
            bound[j] = (sums + (lane * (sizes + j - 1))[:, None]) / j
        # best[c, k, mask, l]: lowest level of `mask` as c trees over k ranks
        best = np.full((trees + 1, ranks + 1, full + 1, num_layers), np.inf)
        best[0, 0, 0] = 0.0
        best[1, 1:, 1:] = bound[1:, 1:]
        subs = [_subsets(mask) for mask in range(full + 1)]
        for mask in range(1, full + 1):
            sub = subs[mask]
            rest = mask ^ sub
            for c in range(2, min(trees, int(sizes[mask])) + 1):
                # Only complete solutions use all ranks; smaller masks leave ranks to the others.
                for k in range(c, ranks + 1):
                    low_level = best[c, k, mask]
                    for j in range(1, k - c + 2):
                        level = np.maximum(bound[j, sub], best[c - 1, k - j, rest]).min(axis=0)
                        np.minimum(low_level, level, out=low_level)
        self._bound, self._best, self._subs, self._full = bound, best, subs, full
        self.levels = np.full((ranks, num_layers), np.inf)
        for c in range(1, trees + 1):
            self.levels[ranks - c] = best[c, ranks, full]

    def build(self, layer: int, copies: int) -> FloatArray:
        """Shares ``[R, H]`` of one layer with at most ``copies`` copies."""
        heads = self._loads.shape[1]
        shares = np.zeros((self._ranks, heads))
        mask, k, c, rank = self._full, self._ranks, self._ranks - copies, 0
        while mask:
            group, j = self._first_tree(layer, mask, k, c)
            members = [h for h in range(heads) if group >> h & 1]
            part = wrap(self._loads[layer, members], j, self._lane)
            shares[rank : rank + j, members] = part
            mask, k, c, rank = mask ^ group, k - j, c - 1, rank + j
        return shares

    def _first_tree(self, layer: int, mask: int, k: int, c: int) -> tuple[int, int]:
        if c == 1:
            return mask, k
        target = self._best[c, k, mask, layer]
        sub = self._subs[mask]
        for j in range(1, k - c + 2):
            level = np.maximum(
                self._bound[j, sub, layer], self._best[c - 1, k - j, mask ^ sub, layer]
            )
            index = int(level.argmin())
            if level[index] <= target:
                return int(sub[index]), j
        raise RuntimeError("no tree reaches the level that was found before")


def _subsets(mask: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Subsets of ``mask`` that hold its lowest head, ascending."""
    low = mask & -mask
    rest = mask ^ low
    out = []
    sub = rest
    while True:
        out.append(sub | low)
        if sub == 0:
            break
        sub = (sub - 1) & rest
    return np.asarray(sorted(out), dtype=np.int64)

# SPDX-License-Identifier: Apache-2.0
"""Level-by-copies curves for layers with many heads: trees of fixed sizes, packed largest first.

The structure is that of ``small_curves.py``: a layer is a set of trees, tree i spans ``k_i`` ranks
and its level is ``(sum of (load + lane) + lane * (k_i - 1)) / k_i``. For every partition of the
ranks into tree sizes the heads are dealt out largest first to the tree whose level grows least (LPT
on machines of speed ``k_i``; without copies at most 4/3 - 1/(3R) of the best packing, R. L. Graham,
"Bounds on multiprocessing timing anomalies", 1969), all layers at once. The best partitions for
each number of copies are then improved by moves and swaps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.placement.solver.wrap import wrap

_GOOD = 1.001  # stop improving a layer this close to its bound
_ROUNDS = 48
_KEEP = 6  # partitions improved for each number of copies; fewer above 8 ranks, for time
_KEEP_MANY = 2
_PAIR_HEADS = 11  # pairs of trees with at most so many heads are divided anew, exactly
_ALL_PARTITIONS = 16  # largest number of ranks for which every partition is tried

IntArray = NDArray[np.int64]


class LargeCurves:
    """Level by number of copies for every layer of ``loads [L, H]``, as SmallCurves."""

    def __init__(self, loads: FloatArray, ranks: int, lane: float) -> None:
        num_layers, heads = loads.shape
        self._loads, self._lane = loads, lane
        self.levels = np.full((ranks, num_layers), np.inf)
        # tree of each head and ranks of each tree, by copies and layer
        self._trees: dict[tuple[int, int], tuple[IntArray, IntArray]] = {}
        floor = (loads.sum(axis=1) + lane * max(heads, ranks)) / ranks
        by_count: dict[int, list[IntArray]] = {}
        for sizes in _partitions(ranks):
            if len(sizes) <= heads:
                by_count.setdefault(len(sizes), []).append(np.asarray(sizes))
        for count in sorted(by_count, reverse=True):
            self._solve(by_count[count], ranks - count, floor)

    def _solve(self, options: list[IntArray], copies: int, floor: FloatArray) -> None:
        """Fill ``levels[copies]`` for the layers where so many copies can still gain something."""
        loads, lane = self._loads, self._lane
        ranks = len(self.levels)
        least = (loads.sum(axis=1) + lane * (loads.shape[1] + copies)) / ranks
        known = self.levels.min(axis=0)
        gain = known > np.maximum(floor * _GOOD, least)
        if not gain.any():
            return
        dealt = [_deal(loads, lane, sizes) for sizes in options]
        level = np.stack([result[1] for result in dealt])  # [options, L]
        order = np.argsort(level, axis=0, kind="stable")[: _KEEP if ranks <= 8 else _KEEP_MANY]
        layers = np.arange(len(loads))
        for pick in order:
            sizes = np.stack([options[int(i)] for i in pick])  # [L, count]
            trees = np.stack([dealt[int(i)][0][layer] for layer, i in enumerate(pick)])
            todo = np.flatnonzero(gain & (self.levels[copies] > floor * _GOOD))
            if len(todo) == 0:
                return
            goal = floor[todo] * _GOOD
            better = _improve(loads[todo], lane, sizes[todo], trees[todo], goal)
            sizes[todo], better = _repair(loads[todo], lane, sizes[todo], better, goal)
            reached = _levels(loads[todo], lane, sizes[todo], better).max(axis=1)
            for index in np.flatnonzero(reached < self.levels[copies, todo]):
                layer = int(layers[todo[index]])
                self.levels[copies, layer] = reached[index]
                self._trees[copies, layer] = (better[index], sizes[layer].copy())

    def build(self, layer: int, copies: int) -> FloatArray:
        """Shares ``[R, H]`` of one layer with at most ``copies`` copies."""
        trees, sizes = self._trees[copies, layer]
        shares = np.zeros((int(sizes.sum()), self._loads.shape[1]))
        rank = 0
        for tree, size in enumerate(sizes):
            members = np.flatnonzero(trees == tree)
            part = wrap(self._loads[layer, members], int(size), self._lane)
            shares[rank : rank + size, members] = part
            rank += int(size)
        return shares


def _partitions(ranks: int) -> Iterator[tuple[int, ...]]:
    """Partitions of ``ranks`` into tree sizes; for many ranks those with at most two above 1."""
    if ranks <= _ALL_PARTITIONS:
        yield from _all_partitions(ranks, ranks)
        return
    for large in range(1, ranks + 1):
        for second in range(1, min(large, ranks - large) + 1 if large > 1 else 1):
            yield (large, second, *([1] * (ranks - large - second)))
    yield (ranks,)
    yield (1,) * ranks


def _all_partitions(total: int, largest: int) -> Iterator[tuple[int, ...]]:
    if total == 0:
        yield ()
        return
    for first in range(min(total, largest), 0, -1):
        for rest in _all_partitions(total - first, first):
            yield (first, *rest)


def _levels(loads: FloatArray, lane: float, sizes: IntArray, trees: IntArray) -> FloatArray:
    """Level ``[L, c]`` of each tree; ``trees [L, H]`` names the tree of each head."""
    num_layers, count = sizes.shape
    used = np.zeros((num_layers, count))
    rows = np.broadcast_to(np.arange(num_layers)[:, None], trees.shape)
    np.add.at(used, (rows, trees), loads + lane)
    level: FloatArray = (used + lane * (sizes - 1)) / sizes
    return level


def _deal(loads: FloatArray, lane: float, sizes: IntArray) -> tuple[IntArray, FloatArray]:
    """Largest first onto trees of ``sizes [c]``: tree of each head ``[L, H]``, level ``[L]``."""
    num_layers, heads = loads.shape
    count = len(sizes)
    rows = np.arange(num_layers)
    order = np.argsort(-loads, axis=1, kind="stable")
    used = np.tile(lane * (sizes - 1.0), (num_layers, 1))
    members = np.zeros((num_layers, count), dtype=np.int64)
    trees = np.zeros((num_layers, heads), dtype=np.int64)
    for step in range(heads):
        head = order[:, step]
        cost = loads[rows, head] + lane
        score = (used + cost[:, None]) / sizes
        if heads - step <= count:  # every tree needs a head
            empty = members == 0
            must = empty.sum(axis=1) >= heads - step
            score = np.where(must[:, None] & ~empty, np.inf, score)
        tree = score.argmin(axis=1)
        trees[rows, head] = tree
        used[rows, tree] += cost
        members[rows, tree] += 1
    return trees, (used / sizes).max(axis=1)


def _improve(
    loads: FloatArray, lane: float, sizes: IntArray, trees: IntArray, goal: FloatArray
) -> IntArray:
    """Moves and swaps out of the fullest tree while its level falls; ``trees [L, H]``."""
    trees = trees.copy()
    heads = loads.shape[1]
    cost = loads + lane
    active = np.arange(len(loads))
    for _ in range(_ROUNDS):
        tree, size = trees[active], sizes[active]
        level = _levels(loads[active], lane, size, tree)
        top = level.argmax(axis=1)
        now = level.max(axis=1)
        keep = now > goal[active]
        if not keep.any():
            break
        active, tree, size, level = active[keep], tree[keep], size[keep], level[keep]
        top, now = top[keep], now[keep]
        rows = np.arange(len(active))
        c = cost[active]
        mine = tree == top[:, None]
        members = mine.sum(axis=1)
        # heads of the fullest tree first; rows with fewer are cut off by `held`
        own = np.argsort(~mine, axis=1, kind="stable")[:, : members.max()]
        held = np.arange(own.shape[1]) < members[:, None]
        cost_own = np.take_along_axis(c, own, axis=1)
        to_size = np.take_along_axis(size, tree, axis=1)
        to_level = np.take_along_axis(level, tree, axis=1)
        top_size = size[rows, top][:, None]
        # exchange of an own head i for a foreign head j
        give = cost_own[:, :, None] - c[:, None, :]
        swap = np.maximum(
            now[:, None, None] - give / top_size[:, None],
            to_level[:, None, :] + give / to_size[:, None, :],
        )
        swap[np.broadcast_to(mine[:, None, :], swap.shape)] = np.inf
        swap[~held] = np.inf
        # move of an own head to another tree; the fullest tree keeps one
        move = np.maximum(
            now[:, None, None] - (cost_own / top_size)[:, :, None],
            level[:, None, :] + cost_own[:, :, None] / size[:, None, :],
        )
        move[~held] = np.inf
        move[rows, :, top] = np.inf
        move[members == 1] = np.inf
        flat = np.concatenate([swap.reshape(len(rows), -1), move.reshape(len(rows), -1)], axis=1)
        best = flat.argmin(axis=1)
        good = flat[rows, best] < now * (1 - 1e-7)
        if not good.any():
            break
        for row in np.flatnonzero(good):
            layer, choice = active[row], int(best[row])
            swaps = own.shape[1] * heads
            if choice < swaps:
                i, j = divmod(choice, heads)
                i = int(own[row, i])
                trees[layer, i], trees[layer, j] = trees[layer, j], trees[layer, i]
            else:
                i, to = divmod(choice - swaps, size.shape[1])
                trees[layer, own[row, i]] = to
        active = active[good]
    return trees


def _repair(
    loads: FloatArray, lane: float, sizes: IntArray, trees: IntArray, goal: FloatArray
) -> tuple[IntArray, IntArray]:
    """Divide the heads and ranks of the fullest tree and one other anew, the best of all ways.

    Returns new ``sizes [L, c]`` and ``trees [L, H]``.
    """
    sizes, trees = sizes.copy(), trees.copy()
    level = _levels(loads, lane, sizes, trees)
    for layer in np.flatnonzero(level.max(axis=1) > goal):
        for _ in range(_ROUNDS):
            if not _repair_once(loads[layer], lane, sizes[layer], trees[layer], goal[layer]):
                break
    return sizes, trees


def _repair_once(
    loads: FloatArray, lane: float, sizes: IntArray, trees: IntArray, goal: float
) -> bool:
    level = _levels(loads[None], lane, sizes[None], trees[None])[0]
    top = int(level.argmax())
    now = float(level[top])
    if now <= goal:
        return False
    for other in np.argsort(level, kind="stable"):
        heads = np.flatnonzero((trees == top) | (trees == other))
        if other == top or len(heads) > _PAIR_HEADS:
            continue
        part = np.zeros(1)
        for cost in loads[heads] + lane:
            part = np.concatenate([part, part + cost])
        total = part[-1]
        ranks = int(sizes[top] + sizes[other])
        one = np.arange(1, ranks)[:, None]
        both = np.maximum(
            (part + lane * (one - 1)) / one,
            (total - part + lane * (ranks - one - 1)) / (ranks - one),
        )[:, 1:-1]
        best = int(both.argmin())
        if both.flat[best] < now * (1 - 1e-7):
            size, mask = divmod(best, both.shape[1])
            chosen = ((mask + 1) >> np.arange(len(heads))) & 1
            trees[heads] = np.where(chosen, top, other)
            sizes[top], sizes[other] = size + 1, ranks - size - 1
            return True
    return False

# SPDX-License-Identifier: Apache-2.0
"""Which rank takes which part of a layer: free for step time, decisive for memory and for how many
rows stay at home.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.placement.problem import Problem
from fairkv_sglang.placement.stay import EVEN, EVENER, best_ranks, homes_of, rows_value
from fairkv_sglang.placement.totals import even_totals


def deal_parts(problem: Problem, shares: FloatArray, even_copies: bool = False) -> FloatArray:
    """Permute the ranks within each layer: most rows at home, with even token totals of the ranks.

    A rank's pages bound its capacity, so the fullest rank may hold ``EVENER`` times what
    :func:`even_totals` alone reaches, or ``EVEN`` times the mean. Each layer's best assignment
    comes first; then parts are exchanged between the fullest rank and another where that costs
    fewest rows for what it relieves, and at last wherever rows come home within the limit. The
    same from even totals and from the ranks as they are; the best of the three is taken. Without
    homes, and with ``even_copies``, it is :func:`even_totals`.
    """
    home = homes_of(problem)
    even = even_totals(problem, shares, even_copies)
    if home is None or even_copies or problem.ranks == 1:
        return even
    value = np.stack([rows_value(tokens) for tokens in problem.tokens])
    best, found = -np.inf, even
    held = np.einsum("lrh,lh->r", even, problem.tokens)
    limit = max(float(held.max()) * EVENER, float(held.mean()) * EVEN)
    near = [plan[best_ranks(_value(plan, v, home))] for plan, v in zip(shares, value, strict=True)]
    for start in (np.stack(near), even, shares):
        dealt = _Dealt(problem, start, value, home).within(limit)
        if dealt is None:
            continue
        rows = float(np.einsum("lrh,lh,rh->", dealt, value, home))
        if rows > best * (1 + 1e-12):
            best, found = rows, dealt
    return found


def _value(plan: FloatArray, rows: FloatArray, home: NDArray[np.bool_]) -> FloatArray:
    """``[parts, ranks]``: rows at home, and a little for lanes that are exactly the home heads."""
    value: FloatArray = np.einsum("ph,rh->pr", plan * rows, home)
    same = ((plan > 0)[:, None] == home[None]).all(axis=2)
    bonus: FloatArray = value + 1e-7 * rows.sum() * same * (plan > 0).sum(axis=1)[:, None]
    return bonus


class _Dealt:
    """Which part each rank has in each layer, changed by exchanges between two ranks of a layer."""

    def __init__(
        self, problem: Problem, start: FloatArray, rows: FloatArray, home: NDArray[np.bool_]
    ) -> None:
        layers, ranks = start.shape[:2]
        self._start = start
        self._tokens = np.einsum("lrh,lh->lr", start, problem.tokens)
        self._value = np.stack([_value(p, r, home) for p, r in zip(start, rows, strict=True)])
        self._where = np.tile(np.arange(ranks), (layers, 1))
        self._held = self._tokens.sum(axis=0)
        self._pairs = np.triu_indices(ranks, 1)

    def within(self, limit: float) -> FloatArray | None:
        """Shares with no rank's total above ``limit``; None if exchanges do not get there."""
        layers, ranks = self._where.shape
        for _ in range(4 * layers * ranks):
            top = int(self._held.argmax())
            over = float(self._held[top]) - limit
            if over <= 0.0:
                return self._bring_home(limit)
            lost, sent = self._exchanges(np.full(ranks, top), np.arange(ranks))
            room = limit - self._held
            # another rank may get full, too, as long as it is not fuller than this one was
            relief = np.minimum(sent, over) - np.maximum(sent - np.maximum(room, 0.0), 0.0)
            good = relief > 1e-9 * limit
            if not good.any():
                return None
            score = np.where(good, lost / np.where(good, relief, 1.0), np.inf)
            layer, rank = divmod(int(score.argmin()), ranks)
            self._exchange(layer, top, rank)
        return None

    def _bring_home(self, limit: float) -> FloatArray:
        one, two = self._pairs
        layers, ranks = self._where.shape
        for _ in range(4 * layers * ranks):
            lost, sent = self._exchanges(one, two)
            fits = (self._held[two] + sent <= limit) & (self._held[one] - sent <= limit)
            gain = np.where(fits, -lost, 0.0)
            index = int(gain.argmax())
            if gain.flat[index] <= 1e-9 * self._value.max():
                break
            layer, pair = divmod(index, len(one))
            self._exchange(layer, int(one[pair]), int(two[pair]))
        return np.take_along_axis(self._start, self._where[:, :, None], axis=1)

    def _exchanges(
        self, one: NDArray[np.int64], two: NDArray[np.int64]
    ) -> tuple[FloatArray, FloatArray]:
        """``[L, n]``: value lost and tokens sent if ranks ``one`` and ``two`` change parts."""
        rows = np.arange(len(self._where))[:, None]
        first, second = self._where[:, one], self._where[:, two]
        now = self._value[rows, first, one] + self._value[rows, second, two]
        then = self._value[rows, first, two] + self._value[rows, second, one]
        tokens = np.take_along_axis(self._tokens, self._where, axis=1)
        return now - then, tokens[:, one] - tokens[:, two]

    def _exchange(self, layer: int, one: int, two: int) -> None:
        where = self._where[layer]
        sent = self._tokens[layer, where[one]] - self._tokens[layer, where[two]]
        self._held[one] -= sent
        self._held[two] += sent
        where[one], where[two] = where[two], where[one]

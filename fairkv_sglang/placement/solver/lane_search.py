# SPDX-License-Identifier: Apache-2.0
"""Who serves what in a layer, and how to change that by one lane.

For a support (which rank serves which head) and loads of the heads the lowest level that any
choice of shares reaches is, by max-flow min-cut (Hall's condition with loads),

    max over rank sets U of (load of the heads served only inside U + lane * lanes of U) / |U|.

Requests are not divisible: a rank of U ends on average half a request away from its level, by a
request of the largest head, unless smaller heads inside U fill the gap. That waste is added
to the load of U, so that a hot head gets a rank more than its mean load asks for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.placement.options import FloatArray

MAX_RANKS = 8  # 2^R rank sets are looked at
_WASTE = 0.5  # of a request, per rank
_MIN_SHARE = 0.02
_TIE = 1e-9
_CHUNK = 8

BoolArray = NDArray[np.bool_]


class Support:
    """Support of one layer and its level, for the expected loads and in every scenario.

    served: ``[R, H]``. expected: costs ``[H]``. scenarios: costs ``[S, H]``. lane: cost of a lane.
    slots: most lanes of a rank. copies: most lanes beyond one per head. batch: requests in it,
    None if they count as divisible. dearer: how far steps may raise the expected level.
    """

    def __init__(
        self,
        served: BoolArray,
        expected: FloatArray,
        scenarios: FloatArray,
        lane: float,
        slots: int,
        copies: int,
        batch: float | None = None,
        dearer: float = np.inf,
    ) -> None:
        self.served, self._lane = served.copy(), lane
        self._slots, self._most = slots, copies + served.shape[1]
        rows = np.concatenate([expected[None], scenarios])
        # Whole multiples of a power of two: sums are exact, so BLAS may add in any order.
        unit = 2.0 ** (np.frexp(rows.sum(axis=1).max())[1] - 50)
        self._rows = np.rint(rows / unit) * unit
        self._mean = scenarios.mean(axis=0)
        self._order = np.argsort(self._mean, kind="stable")
        self._half = _WASTE * self._mean / batch if batch else np.zeros_like(self._mean)
        ranks = len(served)
        self._masks = np.arange(1, 1 << ranks).astype(np.uint8)
        self._bits = (1 << np.arange(ranks)).astype(np.uint8)
        self._in = (self._masks[:, None] & self._bits) > 0  # [U, R]
        self._size = self._in.sum(axis=1)
        self._refresh()
        self._limit = dearer * self.expected_level

    def _refresh(self) -> None:
        values = self._values(self.served[None], slice(None))[0]  # [U, 1 + S]
        self.expected_level = float(values[:, 0].max())
        self.level = float(_mean_level(values[None])[0])
        self._critical = np.unique(values[:, 1:].argmax(axis=0))

    def _values(self, served: BoolArray, sets: slice | NDArray[np.int64]) -> FloatArray:
        """``[C, U, 1 + S]``: load over size of rank ``sets`` for supports ``[C, R, H]``."""
        holders = (served * self._bits[:, None]).sum(axis=1, dtype=np.uint8)  # [C, H]
        inside = (holders[:, None] & ~self._masks[sets, None]) == 0  # [C, U, H]
        load = inside.astype(np.float64) @ self._rows.T
        load += self._lane * (served.sum(axis=2) @ self._in[sets].T)[:, :, None]
        if self._half.any():
            load[:, :, 1:] += self._waste(inside, self._size[sets])[:, :, None]
        values: FloatArray = load / self._size[sets, None]
        return values

    def _waste(self, inside: BoolArray, size: NDArray[np.int64]) -> FloatArray:
        """Load ``[C, U]`` that whole requests leave unfilled, from ``inside [C, U, H]``."""
        waste, smaller = np.zeros(inside.shape[:2]), np.zeros(inside.shape[:2])
        for head in self._order:
            present = inside[:, :, head]
            np.maximum(waste, present * (self._half[head] * size - smaller), out=waste)
            smaller += present * self._mean[head]
        return waste

    def next_step(self) -> tuple[float, BoolArray]:
        """The support ``[R, H]`` one step away with the lowest mean level, and the gain; 0 if
        none is lower.

        A step is a lane more or, where slots are a limit, a lane in another's slot or a lane less.
        """
        steps = self._steps()
        if len(steps) == 0:
            return 0.0, self.served
        # No level is below that of the sets that are critical now: best prospects first.
        prospect = _mean_level(self._values(steps, self._critical))
        order = np.argsort(prospect, kind="stable")
        best, found = self.level * (1 - _TIE), self.served
        for start in range(0, len(order), _CHUNK):
            chunk = order[start : start + _CHUNK]
            if prospect[chunk[0]] >= best:
                break
            values = self._values(steps[chunk], slice(None))
            level = _mean_level(values)
            level[values[:, :, 0].max(axis=1) > self._limit] = np.inf
            index = int(level.argmin())
            if level[index] < best:
                best, found = float(level[index]) * (1 - _TIE), steps[chunk[index]]
        return (self.level - best if found is not self.served else 0.0), found

    def _steps(self) -> BoolArray:
        """Supports ``[C, R, H]`` that relieve a critical rank set."""
        served, lanes = self.served, self.served.sum(axis=1)
        holders = (served * self._bits[:, None]).sum(axis=0, dtype=np.uint8)
        useful = np.zeros(served.shape, dtype=bool)
        for index in self._critical:
            inside = (holders & ~self._masks[index]) == 0
            useful |= np.outer(~self._in[index], inside)
        copied = served & (served.sum(axis=0) > 1)
        free, bound = served.sum() < self._most, self._slots < served.shape[1]
        steps = []
        for rank, head in np.argwhere(useful & ~served).tolist():
            if free and lanes[rank] < self._slots:
                steps.append([(rank, head)])
            elif bound:
                for gone in np.flatnonzero(served[rank]).tolist():
                    step = [(rank, head), (rank, gone)]
                    if copied[rank, gone]:
                        steps.append(step)
                    elif len(self._rows) == 2:  # an exchange; too many to try in scenarios
                        others = np.flatnonzero(served[:, head]).tolist()
                        steps += [[*step, (other, head), (other, gone)] for other in others]
        if bound and self._lane > 0.0:
            relieved = self._in[self._critical].any(axis=0) & (lanes > 1)
            steps += [[(r, h)] for r, h in np.argwhere(copied & relieved[:, None]).tolist()]
        out = np.repeat(served[None], len(steps), axis=0)
        for support, step in zip(out, steps, strict=True):
            for rank, head in step:
                support[rank, head] ^= True
        return out

    def take(self, served: BoolArray) -> None:
        """Go on from ``served [R, H]``, a support of :meth:`next_step`."""
        self.served = served
        self._refresh()


def _mean_level(values: FloatArray) -> FloatArray:
    """Mean over scenarios of the highest value ``[C]`` of ``[C, U, 1 + S]``.

    Of a single one's equal levels that with fewer rank sets there is a little lower: relieving one
    of several fullest ranks is progress.
    """
    level = values[:, :, 1:].max(axis=1)
    if level.shape[1] == 1:
        ties = (values[:, :, 1:] >= level[:, None] * (1 - _TIE)).sum(axis=1)
        level = level * (1 + 1e-7 * ties)
    mean: FloatArray = level.mean(axis=1)
    return mean


def balanced_shares(costs: FloatArray, support: BoolArray, lane: float) -> FloatArray:
    """Shares ``[R, H]`` on a support with the evenest loads of ranks; every lane at least 2 %.

    Each copied head in turn is poured over its ranks like water over what the other heads left
    there; that converges to the least unequal loads.
    """
    shares = support / support.sum(axis=0, keepdims=True)
    split = [int(h) for h in np.flatnonzero((support.sum(axis=0) > 1) & (costs > 0))]
    used = (shares * costs).sum(axis=1) + lane * support.sum(axis=1)
    for _ in range(60):
        moved = 0.0
        for head in split:
            ranks = np.flatnonzero(support[:, head])
            base = used[ranks] - shares[ranks, head] * costs[head]
            new = _pour(base, float(costs[head])) / costs[head]
            new = np.maximum(new, _MIN_SHARE)
            new /= new.sum()
            moved = max(moved, float(np.abs(new - shares[ranks, head]).max()))
            shares[ranks, head] = new
            used[ranks] = base + new * costs[head]
        if moved < 1e-5:
            break
    return np.asarray(shares, dtype=np.float64)


def _pour(base: FloatArray, amount: float) -> FloatArray:
    """Amounts that bring the lowest of ``base`` to one level, ``amount`` in all."""
    order = np.sort(base)
    count = np.arange(1, len(base) + 1)
    level = (order.cumsum() + amount) / count
    last = int(np.flatnonzero(level >= order)[-1])  # the first is, however small the amount
    poured: FloatArray = np.maximum(level[last] - base, 0.0)
    return poured

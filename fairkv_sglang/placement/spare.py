# SPDX-License-Identifier: Apache-2.0
"""Spare copies: room for the router when requests differ from the expected loads.

A plan with the fewest copies balances the expectation exactly and has no freedom left: its trees
cannot lend load to each other. For a support (who serves what) and a scenario (loads of the
heads) the lowest level that any choice of shares reaches is, by max-flow min-cut (Hall's
condition with loads),

    max over rank sets U of (load of the heads served only inside U + lane * lanes of U) / |U|.

Requests are not divisible: a rank of U ends on average half a request away from its level, by a
request of the largest head, unless smaller heads inside U fill the gap. That waste is added
to the load of U, so that a hot head gets a rank more than its mean load asks for.

Edges are added one at a time, over all layers the one that lowers the mean of that level over the
scenarios most, until it is within the tolerance of the ideal (free copies) or no edge pays for
its weight slice any more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.problem import Problem

MAX_RANKS = 8  # 2^R rank sets are looked at
_SCENARIOS = 32
# Variation added to samples and requests in a scenario; by replay of held-out prompts
# (bench/placement.py), where more of either bought nothing.
_UNSEEN, _UNSEEN_COSTED = 0.2, 0.15
_GROUP = 4
_MIN_SHARE = 0.02
_TOLERANCE = 1.01  # free copies
_MIN_GAIN = 1e-4
_WASTE = 0.5  # of a request, per rank
_DEARER = 1.01

BoolArray = NDArray[np.bool_]


def add_spares(problem: Problem, shares: FloatArray, options: PlanOptions) -> FloatArray:
    """Shares ``[L, R, H]`` with spare copies added; unchanged without scenarios.

    Spare copies are not bound to R - 1 per layer, but to the limit of ``options``. For more than
    MAX_RANKS ranks none are added, and ``problem.notes`` says so.
    """
    scenarios = make_scenarios(problem, options)
    if scenarios is None or problem.ranks == 1:
        return shares
    if problem.ranks > MAX_RANKS:
        problem.notes["spare_copies"] = f"none: not available above {MAX_RANKS} ranks"
        return shares
    layers = [
        _Layer(
            scenarios[:, index],
            shares[index] > 0,
            problem.lane,
            problem.batch,
            problem.costs[index],
        )
        for index in range(problem.layers)
    ]
    most = options.most_copies(problem.heads * (problem.ranks - 1))
    ideal = float(scenarios.sum(axis=(1, 2)).mean()) / problem.ranks
    goal = ideal * _TOLERANCE if problem.lane <= 0.0 else -np.inf
    nexts = [layer.next_edge() for layer in layers]
    added = 0
    while sum(layer.level for layer in layers) > goal:
        gains = [nexts[i][0] if layer.copies < most else 0.0 for i, layer in enumerate(layers)]
        index = int(np.argmax(gains))
        if gains[index] <= _MIN_GAIN * layers[index].level:
            break
        layers[index].add(*nexts[index][1:])
        nexts[index] = layers[index].next_edge()
        added += 1
    problem.notes["spare_copies"] = added
    out = shares.copy()
    for index, layer in enumerate(layers):
        if (layer.support != (shares[index] > 0)).any():
            out[index] = balanced_shares(problem.costs[index], layer.support, problem.lane)
    return out


def make_scenarios(problem: Problem, options: PlanOptions) -> FloatArray | None:
    """Costs ``[S, L, H]`` of batches that differ from the mean; None if nothing is known of them.

    With free copies each sampled request stands for a batch of its like, the widest variation;
    where a copy has its price a scenario is the mean of a few requests, closer to a real batch.
    Log-normal factors per head with the coefficient of variation ``options.spread`` stand
    for what the samples do not show; without samples they are all there is.
    """
    samples, spread = problem.samples, options.spread
    rng = np.random.default_rng(0)
    if samples is None or len(samples) < 2:
        if spread <= 0.0:
            return None
        chosen = np.repeat(problem.costs[None], _SCENARIOS, axis=0)
    elif problem.lane > 0.0:
        spread = spread or _UNSEEN_COSTED
        chosen = samples[rng.integers(len(samples), size=(_SCENARIOS, _GROUP))].mean(axis=1)
    else:
        spread = spread or _UNSEEN
        many = np.repeat(samples, max(_SCENARIOS // len(samples), 1), axis=0)
        pick = np.rint(np.linspace(0, len(many) - 1, min(len(many), _SCENARIOS)))
        chosen = many[pick.astype(np.int64)]
    noise = rng.standard_normal(chosen.shape)
    sigma = float(np.sqrt(np.log1p(spread**2)))
    drawn: FloatArray = chosen * np.exp(sigma * noise - 0.5 * sigma**2)
    return drawn


class _Layer:
    """Support of one layer and its level in every scenario."""

    def __init__(
        self, loads: FloatArray, support: BoolArray, lane: float, batch: float, expected: FloatArray
    ) -> None:
        self.loads, self.support, self.lane = loads, support.copy(), lane
        self._expected = expected
        mean = loads.mean(axis=0)
        self._order = np.argsort(-mean, kind="stable")
        self._mean = mean[self._order]
        self._half = _WASTE * self._mean / batch
        ranks = support.shape[0]
        masks = np.arange(1, 1 << ranks)
        self._in = (masks[:, None] >> np.arange(ranks)) & 1 == 1  # [U, R]
        self._size = self._in.sum(axis=1)
        self._refresh()
        self._limit = _DEARER * float(((self._inside @ expected + self._lanes) / self._size).max())

    @property
    def copies(self) -> int:
        """Lanes beyond one per head."""
        return int(self.support.sum()) - int(self.support.shape[1])

    def _refresh(self) -> None:
        # inside[U, h]: every rank that serves h is in U
        self._inside = ~(~self._in[:, :, None] & self.support[None]).any(axis=1)
        # einsum adds in a fixed order, which BLAS with threads does not promise
        inside = self._inside.astype(np.float64)
        self._load = np.einsum("sh,uh->su", self.loads, inside)  # [S, U]
        self._lanes = self.lane * (self._in @ self.support.sum(axis=1))
        self._values = (self._load + self._lanes + self._waste(self._inside)) / self._size
        self.level = float(self._values.max(axis=1).mean())

    def _waste(self, inside: BoolArray) -> FloatArray:
        """Load ``[U]`` that whole requests leave unfilled, from ``inside [U, H]``."""
        present = inside[:, self._order]
        held = np.where(present, self._mean, 0.0)
        smaller = held[:, ::-1].cumsum(axis=1)[:, ::-1] - held
        waste = np.where(present, self._half * self._size[:, None] - smaller, 0.0)
        total: FloatArray = np.maximum(waste.max(axis=1), 0.0)
        return total

    def next_edge(self) -> tuple[float, int, int]:
        """Gain, rank and head of the edge that lowers the mean level most; gain 0 if none."""
        critical = np.unique(self._values.argmax(axis=1))
        useful = np.zeros(self.support.shape, dtype=bool)
        for index in critical:
            useful |= np.outer(~self._in[index], self._inside[index])
        best = (0.0, 0, 0)
        for rank, head in np.argwhere(useful & ~self.support):
            leaves = self._inside[:, head] & ~self._in[:, rank]
            load = self._load - self.loads[:, head, None] * leaves
            lanes = self._lanes + self.lane * self._in[:, rank]
            inside = self._inside.copy()
            inside[leaves, head] = False
            if float(((inside @ self._expected + lanes) / self._size).max()) > self._limit:
                continue
            value = (load + lanes + self._waste(inside)) / self._size
            gain = self.level - float(value.max(axis=1).mean())
            if gain > best[0] * (1 + 1e-9):
                best = (gain, int(rank), int(head))
        return best

    def add(self, rank: int, head: int) -> None:
        """Let ``rank`` serve ``head`` too."""
        self.support[rank, head] = True
        self._refresh()


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
    last = int(np.flatnonzero(level > order)[-1])
    poured: FloatArray = np.maximum(level[last] - base, 0.0)
    return poured

# SPDX-License-Identifier: Apache-2.0
"""Heads that stay at home: among plans of a layer that are equally fast, the one that moves least.

Prompts are computed on SGLang's own split (``homes.py``), and kept rows go from there to the ranks
that own them in decode. A row that is owned at home moves nothing, and a rank whose lanes are its
home heads needs no second copy of their weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from fairkv_sglang.placement.homes import Homes
from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.problem import Problem
from fairkv_sglang.placement.totals import even_totals

SAME = 1.001
"""Plans of a layer whose steps differ by less are the same. Where copies are free plans aim at a
tolerance of their own, and nothing is added to it."""
EVEN, EVENER = 1.01, 1.005
"""The fullest rank's tokens over the mean: even enough; more than the evenest that is allowed."""
_LEAST = 0.02  # smallest part of a head that is worth a lane
_NOTHING = 1e-9
# Price of a new lane against rows that leave home, in lanes; each gives a plan.
_PRICES = (0.0, 1.0, 1e3)

BoolArray = NDArray[np.bool_]


def homes_of(problem: Problem) -> BoolArray | None:
    """``[R, H]`` homes; None where SGLang has no split, as it then has no homes either."""
    heads, ranks = problem.heads, problem.ranks
    if heads % ranks and ranks % heads:
        return None
    return Homes(heads, ranks).at_home


def stay_home(
    problem: Problem,
    options: PlanOptions,
    shares: FloatArray,
    *,
    copying: bool = True,
    between: bool = True,
) -> FloatArray:
    """Shares ``[L, R, H]``: each layer's or, where equally fast, a plan with more rows at home.

    Candidates are the layer as it is, contiguous heads, and (if ``between``) contiguous heads with
    as little moved or copied (if ``copying``) as brings every rank to the level of the layer. Those
    within ``SAME`` of the lowest are equal; of them the one with most rows at home is taken, then
    the one with the fewest weights that are not at home. Limits on copies hold, and ranks' token
    totals can be as even as before.
    """
    home = homes_of(problem)
    if home is None or problem.ranks == 1:
        return shares
    plain = home / home.sum(axis=0)  # contiguous
    most = _most_copies(problem, options, shares, copying)
    out = shares.copy()
    for layer in range(problem.layers):
        copies = int(most[layer]) if between else None
        out[layer] = _Layer(problem, layer, home).best(shares[layer], plain, copies)
    return _as_even(problem, shares, out)


def _as_even(problem: Problem, shares: FloatArray, out: FloatArray) -> FloatArray:
    """``out`` with as many layers of ``shares`` as token totals need to get as even as there."""

    def fullest(plan: FloatArray) -> float:
        totals = np.einsum("lrh,lh->r", even_totals(problem, plan), problem.tokens)
        return float(totals.max() / max(totals.mean(), 1e-300))

    if fullest(out) <= EVEN / EVENER:
        return out
    limit = max(fullest(shares), EVEN / EVENER)
    before, after = (
        np.einsum("lrh,lh->lr", plan, problem.tokens).max(axis=1) for plan in (shares, out)
    )
    order = np.argsort(before - after, kind="stable")
    low, high = 0, len(order)  # layers taken back: too few, enough
    while low < high:
        middle = (low + high) // 2
        mixed = out.copy()
        mixed[order[:middle]] = shares[order[:middle]]
        low, high = (low, middle) if fullest(mixed) <= limit else (middle + 1, high)
    mixed = out.copy()
    mixed[order[:high]] = shares[order[:high]]
    return mixed


def _most_copies(
    problem: Problem, options: PlanOptions, shares: FloatArray, copying: bool
) -> NDArray[np.int64]:
    """``[L]``: copies a candidate may have; the plan's own where they are counted over layers."""
    own: NDArray[np.int64] = (shares > 0).sum(axis=(1, 2)) - problem.heads
    limited = options.max_copies_per_rank is not None or options.max_extra_bytes is not None
    if limited or not copying or problem.lane <= 0.0:
        return own
    most = problem.ranks - 1
    if options.max_copies_per_layer is not None:
        most = min(most, options.max_copies_per_layer)
    return np.asarray(np.maximum(own, most), dtype=np.int64)


class _Layer:
    """One layer: costs ``[H]``, rows ``[H]``, homes ``[R, H]``; its plans are shares ``[R, H]``."""

    def __init__(self, problem: Problem, layer: int, home: BoolArray) -> None:
        self.costs, self.lane, self.home = problem.costs[layer], problem.lane, home
        self.rows = rows_value(problem.tokens[layer])
        self.same = SAME if problem.lane > 0.0 else 1 + _NOTHING

    def best(self, own: FloatArray, plain: FloatArray, copies: int | None) -> FloatArray:
        """The plan with most rows at home among ``own``, ``plain`` and, with at most ``copies``
        copies, those between them (None: there is nothing between).
        """
        own = own[best_ranks(np.einsum("ph,rh->pr", own * self.rows, self.home))]
        plans = [plain, own]
        lowest = min(self._level(plan) for plan in plans)
        if copies is not None and self._level(plain) > lowest * self.same:
            target = lowest * (1 + 0.99 * (self.same - 1))
            plans.append(self._back(own, target))
            for price in _PRICES:
                plan = self._relieve(plain, target, copies, price * self.lane)
                if plan is not None:
                    plans.append(self._back(plan, target))
        levels = [self._level(plan) for plan in plans]
        same = [i for i, level in enumerate(levels) if level <= min(levels) * self.same]
        return plans[min(same, key=lambda i: (-self._at_home(plans[i]), self._moved(plans[i])))]

    def _load(self, plan: FloatArray) -> FloatArray:
        used: FloatArray = (plan * self.costs).sum(axis=1) + self.lane * (plan > 0).sum(axis=1)
        return used

    def _level(self, plan: FloatArray) -> float:
        return float(self._load(plan).max())

    def _at_home(self, plan: FloatArray) -> float:
        return round(float((plan * self.rows * self.home).sum() / self.rows.sum()), 6)

    def _moved(self, plan: FloatArray) -> int:
        return int(twin_lanes(plan[None], self.home).sum())

    def _relieve(
        self, plan: FloatArray, target: float, copies: int, price: float
    ) -> FloatArray | None:
        """``plan`` with parts of heads moved off full ranks until none is above ``target``, those
        first that take fewest rows from home for what they relieve; None if that fails.
        """
        plan = plan.copy()
        ranks, heads = plan.shape
        for _ in range(4 * ranks + heads):
            load = self._load(plan)
            top = int(load.argmax())
            over = float(load[top]) - target
            if over <= target * _NOTHING:
                return plan
            left = copies - (int((plan > 0).sum()) - heads)
            step = self._step(plan, target - load, top, over, left, price)
            if step is None:
                return None
            rank, head, amount, back = step
            _shift(plan, top, rank, head, amount)
            if back >= 0:
                _shift(plan, rank, top, back, float(plan[rank, back]))
        return None

    def _step(
        self, plan: FloatArray, room: FloatArray, top: int, over: float, copies: int, price: float
    ) -> tuple[int, int, float, int] | None:
        """The cheapest way to relieve rank ``top``: to which rank, which head, which share of it,
        and which head comes back for it (-1: none).
        """
        costs, lane = self.costs, self.lane
        own = np.flatnonzero(plan[top])
        held = plan[top, own] * costs[own]  # [n]
        new = plan[:, own] == 0  # [R, n]
        # rows that leave home for each unit of cost that goes from `top` to a rank
        leaves = self.home[top, own].astype(np.float64) - self.home[:, own]
        fits = np.where(np.arange(len(room)) == top, -np.inf, room)[:, None] - lane * new
        best, found = np.inf, None

        def offer(score: FloatArray, allowed: BoolArray) -> tuple[int, ...] | None:
            nonlocal best
            score = np.where(allowed, score, np.inf)
            index = int(score.argmin())
            if not score.flat[index] < best * (1 - _NOTHING):
                return None
            best = float(score.flat[index])
            return tuple(int(i) for i in np.unravel_index(index, score.shape))

        if len(own) > 1:  # all that `top` has of a head
            relief = np.minimum(held + lane, over)
            useful = relief > 0.0
            score = leaves * held / np.where(useful, relief, 1.0)
            at = offer(score, (held <= fits) & useful)
            if at is not None:
                found = (at[0], int(own[at[1]]), float(plan[top, own[at[1]]]), -1)
        part = np.minimum(np.minimum(held * (1 - _LEAST), over)[None], fits)
        enough = part > np.maximum(_LEAST * costs[own] * new, _NOTHING * over)
        relief = np.where(enough, part, 1.0)
        at = offer(leaves + price * new / relief, enough & (~new | (copies > 0)))
        if at is not None:
            head = int(own[at[1]])
            found = (at[0], head, float(part[at] / costs[head]), -1)
        whole = np.flatnonzero((plan == 1.0).any(axis=0))
        mine = np.flatnonzero(plan[top, own] == 1.0)
        holder = plan.argmax(axis=0)
        theirs = whole[holder[whole] != top]
        if len(mine) and len(theirs):  # a head for a smaller one
            to = holder[theirs]
            net = held[mine][:, None] - costs[theirs][None]  # [m, k]
            lost = leaves[to][:, mine].T * held[mine][:, None] + costs[theirs] * (
                self.home[to, theirs].astype(np.float64) - self.home[top, theirs]
            )
            good = (net > _NOTHING * over) & (net <= room[to][None])
            at = offer(lost / np.where(good, np.minimum(net, over), 1.0), good)
            if at is not None:
                found = (int(to[at[1]]), int(own[mine[at[0]]]), 1.0, int(theirs[at[1]]))
        return found

    def _back(self, plan: FloatArray, target: float) -> FloatArray:
        """``plan`` with what ranks away from home serve taken back as far as homes have room."""
        plan = plan.copy()
        away = np.argwhere((plan > 0) & ~self.home)
        amount = plan[away[:, 0], away[:, 1]] * self.costs[away[:, 1]]
        for index in np.argsort(-amount, kind="stable"):
            rank, head = (int(i) for i in away[index])
            for to in np.flatnonzero(self.home[:, head]):
                held = float(plan[rank, head])
                load = self._load(plan)
                new = plan[to, head] == 0
                room, cost = target - load[to] - self.lane * new, float(self.costs[head])
                if held == 0 or room <= 0:
                    continue
                share = min(held, room / cost if cost > 0 else held)
                if share < held and new:  # no lanes more than there are
                    continue
                if share == held and (plan[rank] > 0).sum() == 1:
                    continue
                if held - share < _LEAST and share < held:
                    share = held - _LEAST
                if share > 0:
                    _shift(plan, rank, int(to), head, share)
        return plan


def _shift(plan: FloatArray, rank: int, to: int, head: int, share: float) -> None:
    """Give ``share`` of ``head`` from one rank to another, in place."""
    left = plan[rank, head] - share
    plan[to, head] += share if left > 1e-12 else plan[rank, head]
    plan[rank, head] = left if left > 1e-12 else 0.0
    if (plan[:, head] > 0).sum() == 1:
        plan[to, head] = 1.0


def rows_value(tokens: FloatArray) -> FloatArray:
    """Tokens of heads, with a little for those that have none: their weights stay at home, too."""
    value: FloatArray = tokens + max(1e-6 * float(tokens.mean()), 1e-12)
    return value


def best_ranks(value: FloatArray) -> NDArray[np.int64]:
    """The part ``[R]`` that each rank takes for the highest sum of ``value [parts, ranks]``."""
    parts = linear_sum_assignment(-value.T)[1]
    return np.asarray(parts, dtype=np.int64)


def twin_lanes(shares: FloatArray, home: BoolArray) -> NDArray[np.int64]:
    """Lanes ``[L, R]`` whose weights a rank holds beside those of its home heads: all of a layer's
    unless they are exactly the home heads.
    """
    served = shares > 0
    away = (served != home[None]).any(axis=2)
    lanes: NDArray[np.int64] = np.where(away, served.sum(axis=2), 0)
    return lanes

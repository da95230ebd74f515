# SPDX-License-Identifier: Apache-2.0
"""Heads that stay at home: among plans of a layer that are equally fast, one that moves little.

Prompts are computed on SGLang's own split (``homes.py``), and kept rows go from there to the ranks
that own them in decode. A row that is owned at home moves nothing, and a rank whose lanes are its
home heads needs no second copy of their weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.placement.homes import blocks, home_table
from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.solver.deal import deal
from fairkv_sglang.placement.solver.problem import Problem, rank_loads

SAME = 1.001
"""Plans of a layer whose steps differ by less are the same. Where copies are free plans aim at a
tolerance of their own, and nothing is added to it."""
_LEAST = 0.02  # smallest part of a head that is worth a lane
_NOTHING = 1e-9

BoolArray = NDArray[np.bool_]


def stay_home(
    problem: Problem, options: PlanOptions, shares: FloatArray, *, copying: bool = True
) -> FloatArray:
    """Shares ``[L, R, H]``: each layer's or, where equally fast, a plan with more rows at home.

    Candidates are the layer as it is, contiguous heads, and contiguous heads with as little moved
    or copied (if ``copying``) as brings every rank to the level of the layer. Of those within
    ``SAME`` of the lowest :func:`deal` takes the one with most rows at home that leaves the ranks'
    memory even. The limits on copies and lanes hold.
    """
    lane, heads = problem.lane, problem.heads
    plain, home = blocks(heads, problem.ranks), home_table(heads, problem.ranks)
    costly = lane > 0.0 or options.paid
    same = SAME if costly else 1 + _NOTHING
    plans = []
    for costs, own in zip(problem.costs, shares, strict=True):
        layer = [own, plain]
        lowest = min(float(rank_loads(plan, costs, lane).max()) for plan in layer)
        copies = int((own > 0).sum()) - heads
        if copying and costly:
            copies = max(copies, options.most_copies(problem.ranks - 1))
        target = lowest * (1 + 0.99 * (same - 1))
        between = relieve(
            plain, home, costs, lane, target, copies if copying else None, options.slots(heads)
        )
        if between is not None:
            layer.append(between)
        plans.append([p for p in layer if rank_loads(p, costs, lane).max() <= lowest * same])
    return deal(problem, plans)


def relieve(
    plan: FloatArray,
    home: BoolArray,
    costs: FloatArray,
    lane: float,
    target: float,
    copies: int | None,
    slots: int,
) -> FloatArray | None:
    """``plan`` with parts of heads moved off the fullest rank until none is above ``target``.

    Each step is the one that takes fewest rows from home, and adds fewest lanes, for what it
    relieves. At most ``copies`` copies (None: lanes are moved whole) and ``slots`` lanes on a rank;
    None if it gets stuck.
    """
    plan = plan.copy()
    ranks, heads = plan.shape
    for _ in range(4 * ranks + heads):
        load = rank_loads(plan, costs, lane)
        top = int(load.argmax())
        over = float(load[top]) - target
        if over <= target * _NOTHING:
            return plan
        own = np.flatnonzero(plan[top])
        held = plan[top, own] * costs[own]  # [n]
        new = plan[:, own] == 0  # [R, n]
        fits = target - load[:, None] - lane * new
        fits[top] = -1.0
        least = _LEAST * costs[own]
        part = np.minimum(np.minimum(held - least, over), fits)
        room = ~new | ((plan > 0).sum(axis=1) < slots)[:, None]
        spare = copies is not None and (plan > 0).sum() - heads < copies
        allowed = (part >= np.maximum(least * new, _NOTHING * over)) & (~new | spare) & room
        whole = (held <= fits) & (len(own) > 1) & room
        if copies is None:
            allowed, whole = np.zeros_like(allowed), whole & new
        # what a step takes off the rank; [2, R, n]: a part, all
        relief = np.stack([part, np.broadcast_to(np.minimum(held + lane, over), new.shape)])
        leaves = home[top, own].astype(np.float64) - home[:, own]
        lost = np.stack([leaves * part + lane * new, leaves * held])
        good = np.stack([allowed, whole]) & (relief > 0.0)
        if not good.any():
            return None
        score = np.where(good, lost / np.where(good, relief, 1.0), np.inf)
        kind, rank, index = np.unravel_index(int(score.argmin()), score.shape)
        head = own[index]
        share = plan[top, head] if kind else part[rank, index] / costs[head]
        plan[top, head] -= share
        plan[rank, head] += share
        if (plan[:, head] > 0).sum() == 1:
            plan[rank, head] = 1.0
    return None


def twin_lanes(shares: FloatArray, home: BoolArray) -> NDArray[np.int64]:
    """Lanes ``[L, R]`` whose weights a rank holds beside those of its home heads: all of a layer's
    unless they are exactly the home heads.
    """
    served = shares > 0
    away = (served != home[None]).any(axis=2)
    lanes: NDArray[np.int64] = np.where(away, served.sum(axis=2), 0)
    return lanes

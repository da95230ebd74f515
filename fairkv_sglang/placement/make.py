# SPDX-License-Identifier: Apache-2.0
"""``make_plan``: loads in, checked plan with its figures out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fairkv_sglang.placement.cost import CostModel
from fairkv_sglang.placement.options import FloatArray, PlanOptions, check_loads
from fairkv_sglang.placement.plan import Plan
from fairkv_sglang.placement.policies import POLICIES
from fairkv_sglang.placement.problem import Problem


def make_problem(loads: ArrayLike, tp_size: int, cost: CostModel | None = None) -> Problem:
    """Placement problem of expected kept tokens ``[L, H]``; without ``cost`` copies are free."""
    tokens = check_loads(loads, tp_size)
    if cost is None:
        return Problem(tokens=tokens, costs=tokens, ranks=tp_size, lane=0.0, slice_bytes=0.0)
    return Problem(
        tokens=tokens,
        costs=cost.head_cost(tokens),
        ranks=tp_size,
        lane=cost.lane_cost,
        slice_bytes=cost.slice_bytes,
    )


def make_plan(
    policy: str,
    loads: ArrayLike,
    tp_size: int,
    cost: CostModel | None = None,
    model: str | None = None,
    options: PlanOptions | None = None,
    **limits: Any,
) -> Plan:
    """Place heads with expected kept tokens ``loads [L, H]`` on ``tp_size`` ranks.

    ``cost`` turns tokens into step cost; without it a copy costs nothing. ``limits`` are fields of
    :class:`PlanOptions` (or give ``options``). Raises ValueError with one line for an unknown
    policy and for loads that are not finite, negative or not two-dimensional.
    """
    if policy not in POLICIES:
        choices = ", ".join(POLICIES)
        raise ValueError(f"unknown placement policy {policy!r}; choose one of {choices}")
    if options is None:
        options = PlanOptions(**limits)
    elif limits:
        options = options.model_copy(update=limits)
    problem = make_problem(loads, tp_size, cost)
    shares = POLICIES[policy](problem, options)
    shares = even_totals(problem, shares) if policy != "contiguous" else shares
    return Plan.from_shares(shares, policy, model, info=figures(problem, shares))


def figures(problem: Problem, shares: FloatArray) -> dict[str, Any]:
    """Figures of a plan, plain JSON: balance of tokens and of modelled cost, copies, bounds."""
    tokens = np.einsum("lrh,lh->lr", shares, problem.tokens)
    costs = problem.rank_costs(shares)
    copies = (shares > 0).sum(axis=(1, 2)) - problem.heads
    bound = problem.lower_bound()
    step, low = float(costs.max(axis=1).sum()), float(bound.sum())
    totals = tokens.sum(axis=0)
    return {
        "token_imbalance": _ratio(
            float(tokens.max(axis=1).sum()), float(tokens.mean(axis=1).sum())
        ),
        "step_cost": step,
        "step_lower_bound": low,
        "step_over_bound": _ratio(step, low),
        "copies_per_layer": float(copies.mean()),
        "max_copies_in_a_layer": int(copies.max()),
        "extra_weight_bytes": float(copies.sum() * problem.slice_bytes),
        "rank_token_totals": [float(x) for x in totals],
        "capacity_imbalance": _ratio(float(totals.max()), float(totals.mean())),
        **problem.notes,
    }


def even_totals(problem: Problem, shares: FloatArray) -> FloatArray:
    """Permute ranks within each layer so that token totals over the layers are even.

    Which rank takes which part of a layer does not change step time, but the sum over layers is
    what a rank's pages must hold: the fullest part goes to the rank that holds least so far,
    layers with the widest spread first.
    """
    tokens = np.einsum("lrh,lh->lr", shares, problem.tokens)
    spread = tokens.max(axis=1) - tokens.min(axis=1)
    held = np.zeros(problem.ranks)
    out = np.empty_like(shares)
    for layer in np.argsort(-spread, kind="stable"):
        parts = np.argsort(-tokens[layer], kind="stable")
        ranks = np.argsort(held, kind="stable")
        out[layer, ranks] = shares[layer, parts]
        held[ranks] += tokens[layer, parts]
    return out


def _ratio(value: float, base: float) -> float:
    return value / base if base > 0.0 else 1.0

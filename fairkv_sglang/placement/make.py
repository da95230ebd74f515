# SPDX-License-Identifier: Apache-2.0
"""``make_plan``: loads in, checked plan with its figures out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fairkv_sglang.placement.cost import CostModel
from fairkv_sglang.placement.homes import home_table
from fairkv_sglang.placement.options import (
    FloatArray,
    PlanOptions,
    check_loads,
    check_samples,
    checked,
)
from fairkv_sglang.placement.plan import Plan
from fairkv_sglang.placement.policies import POLICIES, Policy
from fairkv_sglang.placement.solver.deal import deal
from fairkv_sglang.placement.solver.problem import Problem, lower_bound
from fairkv_sglang.placement.solver.stay import twin_lanes


def make_problem(
    loads: ArrayLike,
    tp_size: int,
    cost: CostModel | None = None,
    samples: ArrayLike | None = None,
) -> Problem:
    """Placement problem of expected kept tokens ``[L, H]``; without ``cost`` copies are free."""
    tokens = check_loads(loads, tp_size)
    seen = None if samples is None else check_samples(samples, tokens)
    if cost is None:
        return Problem(tokens, tokens, tp_size, 0.0, 0.0, seen)
    return Problem(
        tokens=tokens,
        costs=cost.head_cost(tokens),
        ranks=tp_size,
        lane=cost.lane_cost,
        slice_bytes=cost.slice_bytes,
        samples=None if seen is None else cost.head_cost(seen),
        batch=cost.batch,
    )


def make_plan(
    policy: str | Policy,
    loads: ArrayLike,
    tp_size: int,
    cost: CostModel | None = None,
    model: str | None = None,
    samples: ArrayLike | None = None,
    lanes: ArrayLike | None = None,
    **options: Any,
) -> Plan:
    """Place heads with expected kept tokens ``loads [L, H]`` on ``tp_size`` ranks.

    ``policy``: a policy with its options, or the name of one.
    ``cost`` turns tokens into step cost; without it a copy costs nothing. ``samples [N, L, H]``,
    kept tokens of sampled requests, let ``fair_copying`` add spare copies where requests differ
    from ``loads``. ``lanes [L, R, H]``, those of a running server, are kept where they are as good
    as others, so that little has to move. ``options`` are fields of :class:`PlanOptions`.

    Raises ValueError with one line for an unknown policy, for a limit that cannot be met and for
    loads that are not finite, negative or not two-dimensional.
    """
    if isinstance(policy, str):
        policy = POLICIES.make(policy)
    checked_options = checked(PlanOptions, **options)
    problem = make_problem(loads, tp_size, cost, samples)
    slots = checked_options.max_lanes
    if slots is not None and slots * tp_size < problem.heads:
        raise ValueError(
            f"{problem.heads} heads do not fit into {slots} lane slots on each of {tp_size} ranks"
        )
    if checked_options.paid and slots is not None:
        problem = replace(problem, lane=0.0, fixed=slots * problem.lane)
    shares = policy.place(problem, checked_options)
    if not policy.fixed:
        served = None if lanes is None else np.asarray(lanes, dtype=bool)
        shares = deal(problem, [[layer] for layer in shares], served)
    info = figures(problem, shares)
    if slots is not None:
        info["lane_slots"] = slots
    if cost is not None:
        # lets the router weigh a rank's weight slices against tokens
        info["lane_tokens"] = round(problem.lane / (cost.token_bytes * cost.kv_byte_cost))
        info["cost_model"] = cost.model_dump()
    return Plan.from_shares(shares, policy.name, model, info=info)


def figures(problem: Problem, shares: FloatArray) -> dict[str, Any]:
    """Figures of a plan, plain JSON: balance of tokens and of modelled cost, copies, bounds."""
    tokens = np.einsum("lrh,lh->lr", shares, problem.tokens)
    costs = problem.rank_costs(shares)
    copies = (shares > 0).sum(axis=(1, 2)) - problem.heads
    bound = lower_bound(problem.costs, problem.ranks, problem.lane)
    fixed = problem.fixed * problem.layers
    step, low = float(costs.max(axis=1).sum()) + fixed, float(bound.sum()) + fixed
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
        **_at_home(problem, shares),
        "capacity_imbalance": _ratio(float(totals.max()), float(totals.mean())),
        **problem.notes,
    }


def _at_home(problem: Problem, shares: FloatArray) -> dict[str, Any]:
    """The part of the expected rows that stays at home and bytes of twins; empty without homes."""
    home = home_table(problem.heads, problem.ranks)
    if not home.any():
        return {}
    stays = float(np.einsum("lrh,lh,rh->", shares, problem.tokens, home))
    twins = twin_lanes(shares, home).sum(axis=0) * problem.slice_bytes
    return {
        "home_rows": _ratio(stays, float(problem.tokens.sum())),
        "twin_bytes": float(twins.sum()),
        "most_twin_bytes": float(twins.max()),
    }


def _ratio(value: float, base: float) -> float:
    return value / base if base > 0.0 else 1.0

# SPDX-License-Identifier: Apache-2.0
"""Budgets and the plan of a configuration: one function makes each, for the server and the
commands alike. Needs a model's sizes only; imports nothing of SGLang.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.budgets import SCOPES, BudgetScope, BudgetSpec, Scorer, make_scope
from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.placement import CostModel, Plan, make_plan
from fairkv_sglang.placement.model import ModelShape
from fairkv_sglang.placement.options import SPARE_LANES, FloatArray
from fairkv_sglang.profiles import HeadProfile, read_profile

__all__ = [
    "REQUEST_SPREAD",
    "ModelShape",
    "budget_text",
    "is_another_method",
    "lane_slots",
    "load_model",
    "make_budgets",
    "make_placement",
    "start_text",
]

# Coefficient of variation of a head's share of its layer's kept tokens between requests, from the
# per-request counts of Tangram's four scorers on Llama-3.1-8B: 0.24 to 0.31 (docs/placement.md).
REQUEST_SPREAD = 0.3


class Traffic(Protocol):
    """What requests kept so far (``profiles.Recorder``)."""

    def mean(self) -> FloatArray:
        """Mean kept tokens ``[L, H]``."""
        ...

    def requests(self) -> NDArray[np.int64]:
        """Kept tokens of each request ``[n, L, H]``."""
        ...


def budget_text(config: FairKVConfig) -> str:
    """The budget as a person would say it."""
    if config.budget is not None:
        return f"{config.budget} tokens per head"
    return f"{config.effective_ratio:.0%} of the prompt"


def make_budgets(
    config: FairKVConfig, num_layers: int, num_kv_heads: int
) -> tuple[Scorer, BudgetScope, HeadProfile | None]:
    """Scorer, scope and profile of a configuration.

    Raises:
        ValueError: in one line, for a profile of another model or a budget that cannot be met.
    """
    scorer = config.make_scorer()
    profile = read_profile(config.profile) if config.profile is not None else None
    spec = BudgetSpec(tokens=config.budget, ratio=config.effective_ratio)
    options = config.options("scope")
    scope = make_scope(config.scope, spec, num_layers, num_kv_heads, scorer, profile, **options)
    return scorer, scope, profile


def make_placement(
    config: FairKVConfig,
    shape: ModelShape,
    scope: BudgetScope,
    tp_size: int,
    *,
    copies_are_free: bool = False,
    traffic: Traffic | None = None,
    max_lanes: int | None = None,
) -> Plan:
    """The plan file of the configuration, or a plan made from the profile or from traffic.

    Args:
        config: Resolved configuration.
        shape: Sizes of the model.
        scope: Budget scope; says what heads are expected to keep.
        tp_size: Ranks.
        copies_are_free: Count neither weights nor activations of a lane.
        traffic: What requests kept, instead of plan file and expectation.
        max_lanes: Lane slots of each (layer, rank). Without it a plan at start has those that the
            server will have (:func:`lane_slots`).

    Raises:
        ValueError: in one line, if a plan file is for another model or number of ranks, or if heads
            do not fit into the slots.
    """
    if config.plan is not None and traffic is None:
        plan = Plan.from_file(config.plan)
        wanted = (shape.num_layers, shape.num_kv_heads, tp_size)
        found = (plan.num_layers, plan.num_kv_heads, plan.tp_size)
        if found != wanted:
            raise ValueError(
                f"plan {config.plan} is for {found[0]} layers, {found[1]} KV heads, TP {found[2]}; "
                f"this server has {wanted[0]} layers, {wanted[1]} KV heads, TP {wanted[2]}"
            )
        return plan
    cost = load_model(config, shape)
    if copies_are_free:
        cost = cost.model_copy(update={"weight_byte_cost": 0.0, "activation_passes": 0.0})
    elif traffic is None and max_lanes is None:
        max_lanes = _slots(config, shape, scope, tp_size)
    # Requests differ from the mean when scores decide; copies that pay for it leave the router room
    # to even that out. Static budgets do not differ.
    samples, spread = None, 0.0
    if traffic is not None:
        loads = traffic.mean()
        samples = traffic.requests() if scope.input_dependent else None
    else:
        loads = scope.expected(config.expected_prompt).astype(np.float64)
        spread = REQUEST_SPREAD if scope.input_dependent and scope.profile is not None else 0.0
    return make_plan(
        config.make_policy(),
        loads,
        tp_size,
        cost=cost,
        model=shape.name,
        samples=samples,
        max_lanes=max_lanes,
        paid=max_lanes is not None and _paid(shape),
        spread=spread,
    )


def lane_slots(
    config: FairKVConfig, shape: ModelShape, scope: BudgetScope, tp_size: int, plan: Plan
) -> int | None:
    """Lane slots of each (layer, rank): home heads and spare ones, at least what ``plan`` needs.

    None where lanes never change, and a rank has those of its plan: with ``replan`` off, on a
    single rank, and for budgets that no prompt changes, whose plan is exact from the start.
    """
    slots = _slots(config, shape, scope, tp_size)
    return None if slots is None else max(slots, int((plan.shares() > 0).sum(axis=2).max()))


def _slots(config: FairKVConfig, shape: ModelShape, scope: BudgetScope, tp_size: int) -> int | None:
    exact = config.plan is None and config.spare_lanes is None and not scope.input_dependent
    exact = exact or config.make_policy().fixed  # there is but one such plan
    if config.replan == "off" or tp_size <= 1 or exact:
        return None
    spare = SPARE_LANES if config.spare_lanes is None else config.spare_lanes
    heads = shape.num_kv_heads
    slots = min(-(-heads // tp_size) + spare, heads)
    # Without a free slot, and without a copy to take one from, no head could ever move.
    return slots if slots * tp_size > heads else None


def _paid(shape: ModelShape) -> bool:
    """Whether an unused lane slot costs as much as a used one: CUDA graphs keep shapes."""
    return shape.device != "cpu"


def is_another_method(config: FairKVConfig, profile: HeadProfile | None) -> bool:
    """Whether a profile was measured with another scorer or scope than the server runs.

    What other heads keep under another method is a guess. Scope ``head`` takes its budgets from the
    profile, whatever it was measured with.
    """
    if profile is None or SCOPES[config.scope].needs_profile:
        return False
    return (profile.meta.get("scorer"), profile.meta.get("scope")) != (config.scorer, config.scope)


def start_text(config: FairKVConfig, profile: HeadProfile | None, adapts: bool) -> str:
    """Where the plan at start comes from and what becomes of it, as a person would say it."""
    if config.plan is not None:
        start = f"the plan of {config.plan}"
    elif profile is None:
        start = "SGLang's even split, as there is no profile"
    elif is_another_method(config, profile):
        method = profile.meta.get("scorer") or profile.meta.get("source") or "something else"
        start = (
            f"the profile {config.profile}, a first guess only: it was measured with {method}, "
            f"this server runs {config.scorer} with scope {config.scope}"
        )
    else:
        start = f"the profile {config.profile}"
    if not adapts:
        return start
    if config.replan == "advise":
        return f"{start}; better plans for the traffic are logged (--fairkv-replan advise)"
    return f"{start}; then plans follow the traffic (--fairkv-replan off to keep it)"


def load_model(config: FairKVConfig, shape: ModelShape) -> CostModel:
    """The load model that a server plans with."""
    return CostModel.for_device(
        shape.device,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        group=shape.group_size,
        weight_bytes=shape.dtype_bytes if shape.weight_bytes is None else shape.weight_bytes,
        kv_bytes=shape.dtype_bytes,
        batch=config.expected_batch,
    )

# SPDX-License-Identifier: Apache-2.0
"""Budgets and the plan of a configuration: one function makes each, for the server and the
commands alike. Needs a model's sizes only; imports nothing of SGLang.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from fairkv_sglang.budgets import BudgetScope, BudgetSpec, Scorer, make_scope, make_scorer
from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.placement import CostModel, Plan, make_plan
from fairkv_sglang.placement.model import ModelShape
from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.profiles import HeadProfile, read_profile

__all__ = ["REQUEST_SPREAD", "ModelShape", "budget_text", "make_budgets", "make_placement"]

# Coefficient of variation of a head's kept tokens between small batches, from the per-request
# counts of Tangram's four scorers on Llama-3.1-8B (docs/placement.md).
REQUEST_SPREAD = 0.3


class Traffic(Protocol):
    """What requests kept so far (``profiles.Recorder``)."""

    def mean(self) -> FloatArray:
        """Mean kept tokens ``[L, H]``."""
        ...

    def spread(self) -> float:
        """How much a head's kept tokens differ between small batches, as ``REQUEST_SPREAD``."""
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
    if config.scorer == "snapkv":
        scorer = make_scorer(
            "snapkv", window=config.window, kernel=config.kernel_size, pooling=config.pooling
        )
    else:
        scorer = make_scorer(config.scorer, sink=config.sink, recent=config.window)
    profile = read_profile(config.profile) if config.profile is not None else None
    spec = BudgetSpec(
        tokens=config.budget, ratio=config.effective_ratio, floor_alpha=config.floor_alpha
    )
    scope = make_scope(config.scope, spec, num_layers, num_kv_heads, scorer, profile)
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
        max_lanes: Lane slots of each (layer, rank), as of :func:`lane_slots`; None: no limit.

    Raises:
        ValueError: in one line, if a plan file is for another model or number of ranks, or needs
            more lanes.
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
    if traffic is not None:
        loads, spread = traffic.mean(), traffic.spread()
    else:
        loads = scope.expected(config.expected_prompt).astype(np.float64)
        # Requests differ from a measured profile when scores decide; copies that pay for it leave
        # the router room to even that out. Static budgets do not differ.
        spread = REQUEST_SPREAD if scope.input_dependent and scope.profile is not None else 0.0
    return make_plan(
        config.placement,
        loads,
        tp_size,
        cost=cost,
        model=shape.name,
        max_copies_per_layer=config.max_copies,
        max_lanes=max_lanes,
        paid=max_lanes is not None and shape.device != "cpu",
        spread=spread,
    )


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

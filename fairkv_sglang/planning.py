# SPDX-License-Identifier: Apache-2.0
"""From configuration, model and TP to everything that a start needs: budgets, plan, lane slots.

One function, :func:`make_start`, for the server, its ranks and all commands. Imports nothing of
SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fairkv_sglang.budgets import SCOPES, BudgetScope, BudgetSpec, Scorer, make_scope
from fairkv_sglang.budgets.scorers.base import SCORE_BYTES
from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.model import Model, Sliding
from fairkv_sglang.placement import CostModel, Plan, Planner
from fairkv_sglang.placement.options import SPARE_LANES, FloatArray
from fairkv_sglang.profiles import HeadProfile, read_profile

__all__ = ["Start", "budget_text", "make_budgets", "make_start", "outputs_text"]


@dataclass(frozen=True)
class Start:
    """What a start is made of, the same on every rank; see :func:`make_start`.

    Attributes:
        config: Resolved configuration.
        model: The model.
        device: Kind of device, ``cuda`` or ``cpu``.
        scorer: What a token is worth.
        scope: Over what a budget is shared.
        planner: Makes later plans, with the lane slots of this start.
        plan: The plan at start.
    """

    config: FairKVConfig
    model: Model
    device: str
    scorer: Scorer
    scope: BudgetScope
    planner: Planner
    plan: Plan

    @property
    def slots(self) -> int | None:
        """Lane slots of each (layer, rank): home heads and spare ones, at least the plan's.

        None where lanes never change, and a rank has those of its plan: with ``replan`` off, on a
        single rank, and for budgets that no prompt changes, whose plan is exact from the start.
        """
        return self.planner.slots

    @property
    def room(self) -> int | None:
        """Those that ranks are built with: none with ``replan`` advise, which changes no lane."""
        return None if self.config.replan == "advise" else self.slots

    def score_bytes(self, heads: int) -> int:
        """Bytes of the scores of ``heads`` heads that lie beside each token of the prefill pool."""
        reads = self.scorer.reads_hidden
        return SCORE_BYTES * heads * len(self.scope.layers) if reads else 0

    @property
    def expected(self) -> FloatArray:
        """Tokens ``[L, H]`` that heads are expected to keep of one prompt."""
        return _expected(self.config, self.scope)

    @property
    def guessed(self) -> bool:
        """Whether the profile was measured with another scorer or scope than the server runs.

        What heads keep under another method is a guess. A scope that takes its budgets from the
        profile does so whatever it was measured with.
        """
        profile, config = self.scope.profile, self.config
        if profile is None or SCOPES[config.scope].needs_profile:
            return False
        method = (profile.meta.get("scorer"), profile.meta.get("scope"))
        return method != (config.scorer, config.scope)

    @property
    def source(self) -> str:
        """Where the plan comes from: ``file``, ``profile`` or ``even``."""
        return "file" if self.config.plan else "profile" if self.config.profile else "even"

    @property
    def text(self) -> str:
        """Where the plan comes from and what becomes of it, as a person would say it."""
        config, profile = self.config, self.scope.profile
        if config.plan is not None:
            start = f"the plan of {config.plan}"
        elif profile is None:
            start = "SGLang's even split, as there is no profile"
        elif self.guessed:
            method = profile.meta.get("scorer") or profile.meta.get("source") or "something else"
            start = (
                f"the profile {config.profile}, a first guess only: it was measured with {method}, "
                f"this server runs {config.scorer} with scope {config.scope}"
            )
        else:
            start = f"the profile {config.profile}"
        if self.slots is None:
            return start
        if config.replan == "advise":
            return f"{start}; better plans for the traffic are logged (--fairkv-replan advise)"
        return f"{start}; then plans follow the traffic (--fairkv-replan off to keep it)"


def make_start(
    config: FairKVConfig, model: Model, tp_size: int, device: str, plan: Plan | None = None
) -> Start:
    """Budgets and plan of a configuration for a model on ``tp_size`` ranks.

    Args:
        config: Resolved configuration.
        model: The model.
        tp_size: Ranks.
        device: Kind of device, whose constants the load model takes.
        plan: The plan that the parent process made, for its ranks; None: it is the configuration's
            file, or is made from the profile (from the even split, if there is none).

    Raises:
        ValueError: in one line, for a profile or plan of another model or number of ranks, for
            budgets that cannot be met, heads that do not fit into the lane slots, scorers that
            cannot share a head among ranks and trained scorers without weights for this model.
    """
    scorer, scope, profile = make_budgets(
        config, model.num_layers, model.num_kv_heads, model.sliding
    )
    if tp_size > model.num_kv_heads and not scorer.averages_group:
        raise ValueError(
            f"scorer {scorer.name} with these options needs all query heads of a KV head on one "
            f"rank, but {tp_size} ranks share {model.num_kv_heads} KV heads: use at most "
            f"{model.num_kv_heads} ranks or another scorer"
        )
    if config.decode_compression and model.sliding is not None:
        raise ValueError(
            "decode_compression: outputs of models with sliding windows are not compressed: leave "
            "--fairkv-decode-compression out"
        )
    scorer.check(model)
    planner = Planner(
        policy=config.placement,
        options=config.options("placement"),
        tp_size=tp_size,
        cost=CostModel.for_model(model, device, config.expected_batch),
        model=model.name,
        slots=_lane_slots(config, model.num_kv_heads, scope, tp_size),
        paid=not device.startswith("cpu"),
        varies=scope.input_dependent,
    )
    if plan is None and config.plan is not None:
        plan = _plan_of_file(config, model, tp_size)
    elif plan is None:
        plan = planner.from_expectation(_expected(config, scope), measured=profile is not None)
    if planner.slots is not None:
        lanes = int((plan.shares() > 0).sum(axis=2).max())
        planner = planner.model_copy(update={"slots": max(planner.slots, lanes)})
    return Start(config, model, device, scorer, scope, planner, plan)


def make_budgets(
    config: FairKVConfig, num_layers: int, num_kv_heads: int, sliding: Sliding | None = None
) -> tuple[Scorer, BudgetScope, HeadProfile | None]:
    """Scorer, scope and profile of a configuration.

    Raises:
        ValueError: in one line, for a profile of another model or a budget that cannot be met.
    """
    scorer = config.make_scorer()
    profile = read_profile(config.profile) if config.profile is not None else None
    spec = BudgetSpec(
        config.budget, config.effective_ratio, config.budget_least, config.budget_most
    )
    options = config.options("scope")
    scope = make_scope(
        config.scope, spec, num_layers, num_kv_heads, scorer, profile, sliding, **options
    )
    return scorer, scope, profile


def budget_text(config: FairKVConfig) -> str:
    """The budget as a person would say it."""
    if config.budget is not None:
        return f"{config.budget} tokens per head"
    bounds = [
        f"{word} {tokens} tokens"
        for word, tokens in (("least", config.budget_least), ("most", config.budget_most))
        if tokens is not None
    ]
    share = f"{100 * (config.effective_ratio or 0):g}% of the prompt"  # 12.5% is not 12%
    return ", ".join([share, *(f"at {b}" for b in bounds)])


def outputs_text(config: FairKVConfig) -> str:
    """What becomes of outputs, as a person would say it."""
    if not config.decode_compression:
        return "outputs all kept"
    by = f"attention of the last {config.decode_window}, redundancy {config.decode_redundancy:g}"
    if config.decode_scorer != "attention":
        by = config.decode_scorer
    return f"outputs compressed every {config.decode_slack} tokens by {by}"


def _expected(config: FairKVConfig, scope: BudgetScope) -> FloatArray:
    return scope.expected(config.expected_prompt).astype(np.float64)


def _plan_of_file(config: FairKVConfig, model: Model, tp_size: int) -> Plan:
    plan = Plan.from_file(str(config.plan))
    wanted = (model.num_layers, model.num_kv_heads, tp_size)
    found = (plan.num_layers, plan.num_kv_heads, plan.tp_size)
    if found != wanted:
        raise ValueError(
            f"plan {config.plan} is for {found[0]} layers, {found[1]} KV heads, TP {found[2]}; "
            f"this server has {wanted[0]} layers, {wanted[1]} KV heads, TP {wanted[2]}"
        )
    return plan


def _lane_slots(config: FairKVConfig, heads: int, scope: BudgetScope, tp_size: int) -> int | None:
    exact = config.plan is None and config.spare_lanes is None and not scope.input_dependent
    exact = exact or config.make_policy().fixed  # there is but one such plan
    if config.replan == "off" or tp_size <= 1 or exact:
        return None
    spare = SPARE_LANES if config.spare_lanes is None else config.spare_lanes
    slots = min(-(-heads // tp_size) + spare, heads)
    # Without a free slot, and without a copy to take one from, no head could ever move.
    return slots if slots * tp_size > heads else None

# SPDX-License-Identifier: Apache-2.0
"""What a start with given launch flags would do, without loading a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fairkv_sglang.cli.output import print_json, print_table
from fairkv_sglang.config import FairKVConfig, from_environment
from fairkv_sglang.model_facts import ModelFacts
from fairkv_sglang.placement import Plan


def preview(flags: Sequence[str], as_json: bool) -> int:
    """Validate the flags as ``launch.py`` does and print the plan and budgets that they lead to.

    Args:
        flags: Launch flags, SGLang's and FairKV's.
        as_json: Print one JSON document instead of tables.

    Returns:
        0. Flags that cannot be served end the process with status 2 and one line.
    """
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    from fairkv_sglang.patches.server_args import model_facts
    from fairkv_sglang.plan_file import received

    load_plugins()
    server_args = prepare_server_args(list(flags))
    server_args.resolve_once()
    config = from_environment()
    if config is None or not config.enabled:
        print("FairKV would be off: add --fairkv")
        return 0
    model = model_facts(server_args)
    plan = received()  # made and handed out by the arguments' own hook, as for the ranks
    if plan is None:
        raise ValueError("FairKV made no plan: its hook on SGLang's arguments did not take effect")
    facts = describe(config, model, plan)
    if as_json:
        print_json(facts)
        return 0
    rows = [[key, value] for key, value in facts.items() if not isinstance(value, list)]
    print_table("this start", ["", "value"], rows)
    rank_rows = [[rank["rank"], rank["lanes"], rank["tokens"]] for rank in facts["ranks"]]
    print_table(
        f"one request of {config.expected_prompt} tokens",
        ["rank", "lanes", "expected kept tokens, all layers"],
        rank_rows,
    )
    return 0


def describe(config: FairKVConfig, model: ModelFacts, plan: Plan) -> dict[str, Any]:
    """Plan and budgets of a start, in plain JSON types.

    Args:
        config: Resolved configuration.
        model: The model's facts.
        plan: The plan that the ranks get.
    """
    from fairkv_sglang.planning import budget_text, lane_slots, make_budgets, start_text

    _, scope, profile = make_budgets(config, model.layers, model.kv_heads)
    slots = lane_slots(config, model.shape("cpu"), scope, plan.tp_size, plan)
    expected = scope.expected(config.expected_prompt)
    tokens = np.einsum("lrh,lh->lr", plan.shares(), expected)
    fullest = float(tokens.max(axis=1).sum() / tokens.mean(axis=1).sum())
    lanes = (plan.shares() > 0).sum(axis=(0, 2))
    return {
        "model": model.name,
        "architecture": model.architecture,
        "layers x KV heads": f"{model.layers} x {model.kv_heads}",
        "scorer": config.scorer,
        "scope": config.scope,
        "budget": budget_text(config),
        "kept tokens of a head (least, mean, most)": (
            f"{int(expected.min())}, {float(expected.mean()):.0f}, {int(expected.max())}"
        ),
        "profile": str(config.profile) if config.profile else "none: all heads alike",
        "placement": plan.policy,
        "plan": start_text(config, profile, slots is not None),
        "lane slots of a rank in a layer": slots or "those of the plan",
        "copies": int(plan.copy_counts().sum()),
        "fullest rank over mean": round(fullest, 4),
        "rows that stay at home": _shown(plan, "home_rows", 1.0, "{:.1%}"),
        "decode twins, all ranks and fullest (MB)": (
            f"{_shown(plan, 'twin_bytes', 1e-6, '{:.1f}')}, "
            f"{_shown(plan, 'most_twin_bytes', 1e-6, '{:.1f}')}"
        ),
        "plan digest": plan.digest,
        "ranks": [
            {"rank": rank, "lanes": int(lanes[rank]), "tokens": round(float(tokens[:, rank].sum()))}
            for rank in range(plan.tp_size)
        ],
    }


def _shown(plan: Plan, key: str, unit: float, text: str) -> str:
    """A figure of the plan, which a plan file from elsewhere need not have."""
    return text.format(plan.info[key] * unit) if key in plan.info else "not said"

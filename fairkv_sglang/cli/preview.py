# SPDX-License-Identifier: Apache-2.0
"""What a start with given launch flags would do, without loading a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fairkv_sglang.cli.output import print_json, print_table
from fairkv_sglang.config import from_environment
from fairkv_sglang.placement import Plan
from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.planning import Start, budget_text, make_start


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

    from fairkv_sglang.patches.server_args import read_model
    from fairkv_sglang.plan_file import received

    load_plugins()
    server_args = prepare_server_args(list(flags))
    server_args.resolve_once()
    config = from_environment()
    if config is None or not config.enabled:
        print("FairKV would be off: add --fairkv")
        return 0
    model = read_model(server_args)
    plan = received()  # made and handed out by the arguments' own hook, as for the ranks
    if plan is None:
        raise ValueError("FairKV made no plan: its hook on SGLang's arguments did not take effect")
    start = make_start(config, model, plan.tp_size, str(server_args.device), plan)
    if as_json:
        print_json(describe(start))
    else:
        print_start(start)
        print_ranks({"plan": start.plan}, start.expected)
    return 0


def print_start(start: Start) -> None:
    """What :func:`describe` says, line by line."""
    for key, value in describe(start).items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {x:g}" for name, x in value.items())
        if not isinstance(value, list):
            print(f"{key}: {value}")


def print_ranks(plans: Mapping[str, Plan], loads: FloatArray) -> None:
    """Expected tokens of each rank under one plan or more, by a short name of each."""
    columns, cells = ["rank"], []
    for name, plan in plans.items():
        shares = plan.shares()
        tokens = np.einsum("lrh,lh->lr", shares, loads)
        worst = (tokens / np.maximum(tokens.mean(axis=1, keepdims=True), 1e-300)).max(axis=0)
        columns += [f"{name}: tokens", "worst", "lanes"]
        cells += [tokens.sum(axis=0).round().astype(int), [f"{x:.2f}" for x in worst]]
        cells += [(shares > 0).sum(axis=(0, 2))]
    rows = [[rank, *row] for rank, row in enumerate(zip(*cells, strict=True))]
    legend = {
        "tokens": "expected kept tokens of one request, over all layers",
        "worst": "rank over mean rank, in the layer where that is most",
        "lanes": "(layer, head) pairs that the rank serves in decode",
    }
    print_table("ranks", columns, rows, legend)


def describe(start: Start) -> dict[str, Any]:
    """Plan and budgets of a start, in plain JSON types."""
    config, model, plan = start.config, start.model, start.plan
    expected = start.expected
    tokens = np.einsum("lrh,lh->lr", plan.shares(), expected)
    fullest = float(tokens.max(axis=1).sum() / tokens.mean(axis=1).sum())
    lanes = (plan.shares() > 0).sum(axis=(0, 2))
    return {
        "model": model.name,
        "architecture": model.architecture,
        "layers x KV heads": f"{model.num_layers} x {model.num_kv_heads}",
        "device": start.device,
        "scorer": config.scorer,
        "scope": config.scope,
        "budget": budget_text(config),
        "expected prompt": config.expected_prompt,
        "kept tokens of a head (least, mean, most)": (
            f"{int(expected.min())}, {float(expected.mean()):.0f}, {int(expected.max())}"
        ),
        "profile": str(config.profile) if config.profile else "none: all heads alike",
        "placement": plan.policy,
        "plan": start.text,
        "lane slots of a rank in a layer": start.slots or "those of the plan",
        "copies": int(plan.copy_counts().sum()),
        "fullest rank over mean": round(fullest, 4),
        "rows that stay at home": _shown(plan, "home_rows", 1.0, "{:.1%}"),
        "decode twins, all ranks and fullest (MB)": (
            f"{_shown(plan, 'twin_bytes', 1e-6, '{:.1f}')}, "
            f"{_shown(plan, 'most_twin_bytes', 1e-6, '{:.1f}')}"
        ),
        "load model": plan.info.get("cost_model", "none"),
        "plan digest": plan.digest,
        "ranks": [
            {"rank": rank, "lanes": int(lanes[rank]), "tokens": round(float(tokens[:, rank].sum()))}
            for rank in range(plan.tp_size)
        ],
    }


def _shown(plan: Plan, key: str, unit: float, text: str) -> str:
    """A figure of the plan, which a plan file from elsewhere need not have."""
    return text.format(plan.info[key] * unit) if key in plan.info else "not said"

# SPDX-License-Identifier: Apache-2.0
"""``fairkv simulate``: plan from half of the recorded prompts, replay the other half."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from fairkv_sglang.cli.output import print_json, print_table, progress
from fairkv_sglang.placement import POLICIES, Plan, make_plan
from fairkv_sglang.placement.draw import draw_series
from fairkv_sglang.placement.options import FloatArray, checked
from fairkv_sglang.placement.requests import Requests, read_requests
from fairkv_sglang.placement.simulate import Replay, Traffic, simulate

DEFAULT_POLICIES = "contiguous,best_effort,equal_shares,fair_copying"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the sub-command."""
    parser.add_argument("requests", help="kept tokens of requests (tangram's JSON)")
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--policies", default=DEFAULT_POLICIES)
    parser.add_argument("--plan", help="replay this plan file instead of planning")
    parser.add_argument("--batch", type=int, default=32, help="requests at a time; default 32")
    parser.add_argument("--steps", type=int, default=400, help="decode steps; default 400")
    parser.add_argument("--shortest", type=int, default=64, help="steps of a request, at least")
    parser.add_argument("--longest", type=int, default=512, help="steps of a request, at most")
    parser.add_argument("--length-spread", type=float, default=0.0, help="variation of lengths")
    parser.add_argument("--growth", action="store_true", help="generated tokens are kept")
    parser.add_argument("--exact", action="store_true", help="kept tokens known at admission")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=1024.0, help="mean kept tokens per head")
    parser.add_argument("--window", type=int, default=32, help="tokens that every head keeps")
    parser.add_argument("--floor", type=float, default=0.2, help="Ada-KV floor of every head")
    parser.add_argument("--png", metavar="PATH", help="draw the balance over time")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Plan, replay both ways round, print."""
    requests = read_requests(args.requests, args.budget, args.window, args.floor)
    names = ["plan"] if args.plan else [n.strip() for n in args.policies.split(",") if n.strip()]
    for name in names:
        if name not in POLICIES and not args.plan:
            raise ValueError(f"unknown policy {name!r}; choose from {', '.join(POLICIES)}")
    fixed = Plan.from_file(args.plan) if args.plan else None
    sizes = [fixed.tp_size] if fixed else args.tp
    traffic = checked(
        Traffic,
        **{name: getattr(args, name) for name in Traffic.model_fields},
    )
    results: list[dict[str, Any]] = []
    series: dict[str, dict[str, FloatArray]] = {}
    with progress("replaying", len(sizes) * len(names) * 2 * args.steps) as step:
        for tp in sizes:
            for name in names:
                runs = both_ways(requests, name, tp, traffic, step, fixed)
                results.append({"tp": tp, "policy": name, **summary(runs)})
                series.setdefault(f"TP {tp}", {})[name] = runs[0][1].series
    if args.png:
        draw_series(series, args.png, f"{args.requests}, batch {args.batch}")
    split = "plan from half of the distinct prompts, replay the other half; then swapped"
    if args.json:
        print_json({"split": split, "traffic": traffic.model_dump(), "results": results})
        return 0
    print(f"{args.requests}: {split}")
    print(f"{traffic!r}, budget {args.budget}, window {args.window}, floor {args.floor}")
    print_table(
        "realised imbalance (fullest rank / mean rank, over layers and steps)",
        ["policy", "TP", "first half held out", "second", "worst step", "copies/layer", "most"],
        [
            [r["policy"], r["tp"], *(f"{v:.3f}" for v in r["imbalance"]),
             f"{r['worst_step']:.3f}", f"{r['copies_per_layer']:.2f}", r["max_copies_in_a_layer"]]
            for r in results
        ],
    )  # fmt: skip
    if args.png:
        print(f"wrote {args.png}")
    return 0


def both_ways(
    requests: Requests,
    policy: str,
    tp: int,
    traffic: Traffic,
    step: Any = None,
    fixed: Plan | None = None,
) -> list[tuple[Plan, Replay]]:
    """Plan on one half and replay the other, then the other way round."""
    halves = requests.halves()
    if min(len(half) for half in halves) == 0:
        raise ValueError("two halves need at least two distinct prompts")
    out = []
    for seen, held_out in (halves[::-1], halves):
        kept = requests.kept[seen]
        expected = kept.mean(axis=0)
        plan = fixed or make_plan(policy, expected, tp, samples=kept)
        replay = simulate(plan, requests.kept[held_out], expected, traffic, step)
        out.append((plan, replay))
    return out


def summary(runs: list[tuple[Plan, Replay]]) -> dict[str, Any]:
    """Figures of both directions."""
    return {
        "imbalance": [replay.imbalance for _, replay in runs],
        "worst_step": max(float(replay.series.max()) for _, replay in runs),
        "copies_per_layer": float(np.mean([plan.copy_counts().mean() for plan, _ in runs])),
        "max_copies_in_a_layer": int(max(plan.copy_counts().max() for plan, _ in runs)),
        "requests": [replay.requests for _, replay in runs],
    }

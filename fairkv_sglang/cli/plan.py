# SPDX-License-Identifier: Apache-2.0
"""``fairkv plan``: profile + model + TP -> plan, table, picture. Needs no weights and no GPU."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.cli.output import print_json, print_table, progress, quiet_stdout
from fairkv_sglang.cli.traffic import (
    add_limit_arguments,
    add_model_arguments,
    cost_model,
    model_shape,
    plan_options,
)
from fairkv_sglang.placement import POLICIES, Plan, make_plan
from fairkv_sglang.placement.draw import draw_plan
from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.placement.requests import read_requests
from fairkv_sglang.profiles import FORMATS, read_profile

COLUMNS = [
    "policy",
    "tokens max/mean",
    "step / bound",
    "copies/layer",
    "most",
    "extra MB",
    "memory max/mean",
    "seconds",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the sub-command."""
    parser.add_argument("profile", nargs="?", help="head profile (any supported format)")
    parser.add_argument("--profile", dest="profile_flag", metavar="FILE", help="the same as a flag")
    parser.add_argument("--format", default="auto", choices=["auto", *FORMATS])
    parser.add_argument("--tp", type=int, required=True, help="tensor-parallel ranks")
    parser.add_argument("--policy", default="fair_copying", choices=list(POLICIES))
    parser.add_argument(
        "--compare", default="contiguous,best_effort", help="policies beside it; '' for none"
    )
    parser.add_argument("--samples", metavar="PATH", help="requests (tangram) for spare copies")
    parser.add_argument("--out", metavar="PLAN.json", help="write the plan")
    parser.add_argument("--png", metavar="PATH", help="draw loads before/after and the placement")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_model_arguments(parser)
    add_limit_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Plan, print, write."""
    if (args.profile is None) == (args.profile_flag is None):
        raise ValueError("give one head profile: fairkv plan FILE, or fairkv plan --profile FILE")
    args.profile = args.profile or args.profile_flag
    profile = read_profile(args.profile, args.format)
    loads = profile.relative * args.budget
    samples = None
    if args.samples:
        samples = read_requests(args.samples, budget=args.budget).kept
    shape = model_shape(args, *loads.shape)
    cost, options = cost_model(args, shape), plan_options(args)
    names = [name.strip() for name in args.compare.split(",") if name.strip()]
    names = [name for name in dict.fromkeys(names) if name != args.policy] + [args.policy]
    plans: dict[str, Plan] = {}
    seconds: dict[str, float] = {}
    with progress("planning", len(names)) as step:
        for name in names:
            start = time.perf_counter()
            with quiet_stdout():
                plans[name] = make_plan(name, loads, args.tp, cost, profile.model, samples, options)
            seconds[name] = time.perf_counter() - start
            step()
    plan = plans[args.policy]
    if args.out:
        plan.to_file(args.out)
    if args.png:
        draw_plan(plan, _png(args.png), loads, plans.get("contiguous"))
    settings = _settings(args, loads, cost.model_dump())
    if args.json:
        results = {n: {**p.info, "seconds": seconds[n]} for n, p in plans.items()}
        print_json({"settings": settings, "policies": results, "plan": args.out, "png": args.png})
        return 0
    for key, value in settings.items():
        print(f"{key}: {value}")
    rows = [row(name, p, seconds[name]) for name, p in plans.items()]
    print_table(f"TP {args.tp}", COLUMNS, rows)
    _print_ranks(plan, plans.get("contiguous"), loads)
    for name in ("solver", "layers_proved", "largest_gap", "spare_copies"):
        if name in plan.info:
            print(f"{name}: {plan.info[name]}")
    for path in filter(None, (args.out, args.png)):
        print(f"wrote {path}")
    return 0


def row(name: str, plan: Plan, seconds: float) -> list[str]:
    """One line of the comparison, in the order of COLUMNS."""
    info = plan.info
    return [
        name,
        f"{info['token_imbalance']:.3f}",
        f"{info['step_over_bound']:.4f}",
        f"{info['copies_per_layer']:.2f}",
        str(info["max_copies_in_a_layer"]),
        f"{info['extra_weight_bytes'] / 1e6:.1f}",
        f"{info['capacity_imbalance']:.4f}",
        f"{seconds:.2f}",
    ]


def _settings(args: argparse.Namespace, loads: FloatArray, cost: dict[str, Any]) -> dict[str, Any]:
    return {
        "profile": args.profile,
        "layers x KV heads": f"{loads.shape[0]} x {loads.shape[1]}",
        "mean budget": args.budget,
        "load model": cost,
    }


def _print_ranks(plan: Plan, before: Plan | None, loads: FloatArray) -> None:
    """Expected tokens of each rank over all layers, and how often it is the fullest of a layer."""
    columns, tables = ["rank"], []
    for name, item in (("before", before), ("after", plan)):
        if item is not None:
            tokens = np.einsum("lrh,lh->lr", item.shares(), loads)
            columns += [f"{name}: tokens", "max/mean in a layer", "lanes"]
            lanes = (item.shares() > 0).sum(axis=(0, 2))
            mean = np.maximum(tokens.mean(axis=1, keepdims=True), 1e-300)
            tables.append((tokens.sum(axis=0), (tokens / mean).max(axis=0), lanes))
    rows = [
        [rank, *(c for t, m, n in tables for c in (f"{t[rank]:.0f}", f"{m[rank]:.2f}", n[rank]))]
        for rank in range(plan.tp_size)
    ]
    print_table("expected tokens of one request, over all layers", columns, rows)


def _png(path: str) -> Path:
    if Path(path).suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise ValueError(f"picture {path}: name it .png, .svg or .pdf")
    return Path(path)

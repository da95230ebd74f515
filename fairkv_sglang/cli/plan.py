# SPDX-License-Identifier: Apache-2.0
"""``fairkv plan``: the plan that a server makes, without weights and without a GPU.

It takes the server's flags and makes the plan as the server does (``planning.make_placement``), so
the same input gives the same plan.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.cli.output import print_json, print_table, progress, quiet_stdout
from fairkv_sglang.config import FairKVConfig, add_flags, from_flags
from fairkv_sglang.placement import Plan
from fairkv_sglang.placement.model import DTYPE_BYTES, ModelShape
from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.placement.plan_picture import draw_plan
from fairkv_sglang.planning import budget_text, make_budgets, make_placement
from fairkv_sglang.profiles import FORMATS, read_profile

COLUMNS = [
    "policy",
    "tokens max/mean",
    "step / bound",
    "copies/layer",
    "most",
    "rows at home",
    "twin MB, all",
    "of a rank",
    "memory max/mean",
    "seconds",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the sub-command: output, model, and the server's own."""
    add = parser.add_argument
    add("profile", nargs="?", help=f"head profile; formats: {', '.join(FORMATS)}")
    add("--tp", "--tp-size", type=int, required=True, dest="tp", help="tensor-parallel ranks")
    add("--compare", default="contiguous,best_effort", help="policies beside it; '' for none")
    add("--out", metavar="PLAN.json", help="write the plan, for --fairkv-plan")
    add("--png", metavar="PATH", help="draw loads before/after and the placement")
    add("--json", action="store_true", help="print JSON")
    add(
        "--copies-are-free",
        action="store_true",
        help="a copy costs nothing: the fewest that balance kept tokens (no server plans so)",
    )
    # short forms of the server's flags
    hidden = argparse.SUPPRESS
    add("--profile", dest="fairkv_profile", metavar="FILE", default=hidden, help=hidden)
    add("--policy", dest="fairkv_placement", metavar="NAME", default=hidden, help=hidden)
    model = parser.add_argument_group(
        "model", "as the server's; without --model-path sizes are the profile's and the flags below"
    )
    model.add_argument("--model-path", metavar="PATH", help="config.json, or its folder")
    model.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default cuda")
    model.add_argument(
        "--dtype", default="auto", choices=tuple(DTYPE_BYTES), help="default auto, 16 bit"
    )
    model.add_argument("--group", type=int, help="query heads per KV head; default 4")
    model.add_argument("--head-dim", type=int, help="default 128")
    model.add_argument("--hidden-size", type=int, help="default KV heads x group x head dim")
    model.add_argument("--weight-bytes", type=float, help="per parameter; default that of --dtype")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Plan, print, write."""
    config = configuration(args)
    shape = model_shape(args, config)
    _, scope, _ = make_budgets(config, shape.num_layers, shape.num_kv_heads)
    loads = scope.expected(config.expected_prompt).astype(np.float64)
    own = "plan" if config.plan is not None else str(config.placement)
    names = [name.strip() for name in args.compare.split(",") if name.strip()]
    names = [name for name in dict.fromkeys(names) if name != own] + [own]
    plans: dict[str, Plan] = {}
    seconds: dict[str, float] = {}
    with progress("planning", len(names)) as step:
        for name in names:
            start = time.perf_counter()
            chosen = config
            if name != own:
                chosen = config.with_method("placement", name).model_copy(update={"plan": None})
            with quiet_stdout():
                plans[name] = make_placement(
                    chosen, shape, scope, args.tp, copies_are_free=args.copies_are_free
                )
            seconds[name] = time.perf_counter() - start
            step()
    plan = plans[own]
    if args.out:
        plan.to_file(args.out)
    if args.png:
        draw_plan(plan, _png(args.png), loads, plans.get("contiguous"))
    settings = _settings(args, config, shape, plan)
    if args.json:
        results = {n: {**p.info, "seconds": seconds[n]} for n, p in plans.items()}
        print_json({"settings": settings, "policies": results, "plan": args.out, "png": args.png})
        return 0
    for key, value in settings.items():
        print(f"{key}: {value}")
    print_table(f"TP {args.tp}", COLUMNS, [row(n, p, seconds[n]) for n, p in plans.items()])
    _print_ranks(plan, plans.get("contiguous"), loads)
    for name in ("solver", "layers_proved", "largest_gap", "spare_copies"):
        if name in plan.info:
            print(f"{name}: {plan.info[name]}")
    for path in filter(None, (args.out, args.png)):
        print(f"wrote {path}")
    return 0


def configuration(args: argparse.Namespace) -> FairKVConfig:
    """FairKV's configuration of the flags, as of a server that has FairKV on.

    Raises:
        ValueError: for wrong values, and for two profiles.
    """
    if args.profile is not None:
        if hasattr(args, "fairkv_profile"):
            raise ValueError("give one head profile: fairkv plan FILE, or --fairkv-profile FILE")
        args.fairkv_profile = args.profile
    args.fairkv_enabled = True
    return from_flags(args)


def model_shape(args: argparse.Namespace, config: FairKVConfig) -> ModelShape:
    """Sizes from the model's config.json; without one from the profile, flags and defaults.

    Raises:
        ValueError: if neither is given, or sizes are given beside a model.
    """
    given = {
        name: getattr(args, name)
        for name in ("group", "head_dim", "hidden_size", "weight_bytes")
        if getattr(args, name) is not None
    }
    for name, value in given.items():
        if value <= 0:
            raise ValueError(f"--{name.replace('_', '-')}: {value} must be greater than 0")
    if args.model_path:
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise ValueError(f"--{flag}: the model of --model-path has its own, leave one out")
        return ModelShape.from_config(args.model_path, args.dtype, args.device)
    if config.profile is None:
        raise ValueError("give a model (--model-path) or a head profile, which say what to place")
    profile = read_profile(config.profile)
    layers, heads = profile.shares.shape
    group, head_dim = given.get("group", 4), given.get("head_dim", 128)
    return ModelShape(
        name=profile.model or "model",
        num_layers=layers,
        num_kv_heads=heads,
        group_size=group,
        head_dim=head_dim,
        hidden_size=given.get("hidden_size", heads * group * head_dim),
        dtype_bytes=DTYPE_BYTES[args.dtype],
        device=args.device,
        weight_bytes=given.get("weight_bytes"),
    )


def row(name: str, plan: Plan, seconds: float) -> list[str]:
    """One line of the comparison, in the order of COLUMNS."""
    info = plan.info
    parts = [
        ("token_imbalance", 1.0, ".3f"),
        ("step_over_bound", 1.0, ".4f"),
        ("copies_per_layer", 1.0, ".2f"),
        ("max_copies_in_a_layer", 1.0, ".0f"),
        ("home_rows", 1.0, ".1%"),
        ("twin_bytes", 1e-6, ".0f"),
        ("most_twin_bytes", 1e-6, ".0f"),
        ("capacity_imbalance", 1.0, ".4f"),
    ]
    # a plan file from elsewhere need not have figures
    cells = [f"{info[key] * unit:{shown}}" if key in info else "-" for key, unit, shown in parts]
    return [name, *cells, f"{seconds:.2f}"]


def _settings(
    args: argparse.Namespace, config: FairKVConfig, shape: ModelShape, plan: Plan
) -> dict[str, Any]:
    return {
        "model": shape.name,
        "profile": str(config.profile) if config.profile else "none: all heads alike",
        "layers x KV heads": f"{shape.num_layers} x {shape.num_kv_heads}",
        "device": args.device,
        "scope": config.scope,
        "budget": f"{budget_text(config)}, prompts of {config.expected_prompt}",
        "lane slots of a rank": plan.info.get("lane_slots", "as the plan needs"),
        "load model": plan.info.get("cost_model", "none"),
        "plan digest": plan.digest,
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

# SPDX-License-Identifier: Apache-2.0
"""``fairkv plan``: the plan that a server makes, without weights and without a GPU.

It takes the server's flags and makes the plan as the server does (``planning.make_start``), so
the same input gives the same plan.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fairkv_sglang.cli.output import (
    PICTURES,
    check_output,
    print_json,
    print_table,
    progress,
    quiet_stdout,
)
from fairkv_sglang.cli.preview import describe, print_ranks, print_start
from fairkv_sglang.config import FairKVConfig, add_flags, from_flags
from fairkv_sglang.model import DTYPE_BYTES, PRESETS, Model
from fairkv_sglang.placement import Plan
from fairkv_sglang.placement.plan_picture import draw_plan
from fairkv_sglang.planning import Start
from fairkv_sglang.profiles import FORMATS, read_profile
from fairkv_sglang.support import check_split, check_start

# header: (cell from a plan's figures, what it is)
COLUMNS: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "max/mean": (
        lambda info: f"{info['token_imbalance']:.3f}",
        "kept tokens of a layer's fullest rank over the mean rank, all layers; 1 is perfect",
    ),
    "step": (
        lambda info: f"{info['step_over_bound']:.3f}",
        "modelled decode step over a lower bound for any placement; 1 cannot be beaten",
    ),
    "copies": (
        lambda info: f"{info['copies_per_layer']:.2f}/{info['max_copies_in_a_layer']}",
        "copies of heads in a layer, mean / most",
    ),
    "home": (
        lambda info: f"{info['home_rows']:.0%}",
        "part of the kept rows that are decoded where they were computed",
    ),
    "MB": (lambda info: f"{info['twin_bytes'] / 1e6:.0f}", "weights of decode twins, all ranks"),
    "MB max": (lambda info: f"{info['most_twin_bytes'] / 1e6:.0f}", "the same, fullest rank"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the sub-command: output, model, and the server's own."""
    add, hidden = parser.add_argument, argparse.SUPPRESS
    add("profile", nargs="?", help=f"head profile; formats: {', '.join(FORMATS)}")
    add("--tp", "--tp-size", type=int, required=True, dest="tp", help="tensor-parallel ranks")
    add(
        "--model-path",
        metavar="MODEL",
        help=f"config.json, its folder, or one of {', '.join(PRESETS)}; default: heads as in the "
        "profile, other sizes as in llama-3.1-8b",
    )
    add("--device", default="cuda", choices=("cuda", "cpu"), help="default cuda")
    add("--dtype", default="auto", choices=tuple(DTYPE_BYTES), help="default auto, 16 bit")
    add("--compare", default="contiguous,best_effort", help="policies beside it; '' for none")
    add("--out", type=Path, metavar="PLAN.json", help="write the plan, for --fairkv-plan")
    add("--png", type=Path, metavar="PATH", help="draw loads before/after and the placement")
    add("--json", action="store_true", help="print JSON")
    # short forms of the server's flags
    add("--profile", dest="fairkv_profile", metavar="FILE", default=hidden, help=hidden)
    add("--policy", dest="fairkv_placement", metavar="NAME", default=hidden, help=hidden)
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Plan, print, write."""
    for path, endings in ((args.out, (".json",)), (args.png, PICTURES)):
        if path is not None:
            check_output(path, endings)
    config = configuration(args)
    model = model_of(args, config)
    check_split(model, args.tp)
    own = "plan" if config.plan is not None else str(config.placement)
    names = [name.strip() for name in args.compare.split(",") if name.strip()]
    names = [name for name in dict.fromkeys(names) if name != own] + [own]
    starts: dict[str, Start] = {}
    seconds: dict[str, float] = {}
    with progress("planning", len(names)) as step:
        for name in names:
            begin = time.perf_counter()
            chosen = config
            if name != own:
                chosen = config.with_method("placement", name).model_copy(update={"plan": None})
            with quiet_stdout():
                starts[name] = check_start(chosen, model, args.tp, args.device)
            seconds[name] = time.perf_counter() - begin
            step()
    start = starts[own]
    plans = {name: other.plan for name, other in starts.items()}
    if args.out:
        start.plan.to_file(args.out)
    if args.png:
        draw_plan(start.plan, args.png, start.expected, plans.get("contiguous"))
    if args.json:
        settings = describe(start)
        ranks = settings.pop("ranks")
        results = {n: {**p.info, "seconds": seconds[n]} for n, p in plans.items()}
        written = {key: str(path) if path else None for key, path in
                   (("plan", args.out), ("png", args.png))}  # fmt: skip
        print_json({"settings": settings, "policies": results, "ranks": ranks, **written})
        return 0
    print_start(start)
    legend = {head: column[1] for head, column in COLUMNS.items()} | {"s": "seconds of planning"}
    rows = [row(name, plan, seconds[name]) for name, plan in plans.items()]
    print_table(f"TP {args.tp}", ["policy", *legend], rows, legend)
    both = {"even": plans["contiguous"]} if "contiguous" in plans and own != "contiguous" else {}
    print_ranks({**both, "plan": start.plan}, start.expected)
    for name in ("solver", "layers_proved", "largest_gap", "spare_copies"):
        if name in start.plan.info:
            print(f"{name}: {start.plan.info[name]}")
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


def model_of(args: argparse.Namespace, config: FairKVConfig) -> Model:
    """The model of ``--model-path``; without it the profile's heads with usual sizes.

    Raises:
        ValueError: if neither is given.
    """
    width = DTYPE_BYTES[args.dtype]
    if args.model_path in PRESETS and not Path(args.model_path).exists():
        return replace(PRESETS[args.model_path], dtype_bytes=width)
    if args.model_path:
        return Model.from_config(args.model_path, args.dtype)
    if config.profile is None:
        raise ValueError("give a model (--model-path) or a head profile, which say what to place")
    profile = read_profile(config.profile)
    layers, heads = profile.shares.shape
    like = PRESETS["llama-3.1-8b"]
    return Model(
        name=profile.model or "model",
        num_layers=layers,
        num_q_heads=heads * like.group_size,
        num_kv_heads=heads,
        head_dim=like.head_dim,
        hidden_size=heads * like.group_size * like.head_dim,
        dtype_bytes=width,
    )


def row(name: str, plan: Plan, seconds: float) -> list[str]:
    """One line of the comparison: policy, COLUMNS, seconds."""

    def cell(text: Callable[[dict[str, Any]], str]) -> str:
        try:
            return text(plan.info)
        except KeyError:  # a plan file from elsewhere need not have figures
            return "-"

    return [name, *(cell(text) for text, _ in COLUMNS.values()), f"{seconds:.2f}"]

# SPDX-License-Identifier: Apache-2.0
"""``fairkv plot``: a plan as PNG, with rank loads if a profile is given."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairkv_sglang.cli.output import PICTURES, check_output, print_json
from fairkv_sglang.placement import Plan, Planner
from fairkv_sglang.placement.plan_picture import draw_plan
from fairkv_sglang.profiles import FORMATS, read_profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the sub-command."""
    parser.add_argument("plan", help="plan file, from `fairkv plan --out`")
    parser.add_argument("--out", metavar="PNG", help="default: the plan's name with .png")
    parser.add_argument("--profile", help="head profile, for the loads of the ranks")
    parser.add_argument("--format", default="auto", choices=["auto", *FORMATS])
    parser.add_argument("--budget", type=float, default=1024.0, help="mean kept tokens per head")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Draw the plan."""
    plan = Plan.from_file(args.plan)
    out = Path(args.out) if args.out else Path(args.plan).with_suffix(".png")
    check_output(out, PICTURES)
    loads = before = None
    if args.profile:
        profile = read_profile(args.profile, args.format)
        profile.require_shape(plan.num_layers, plan.num_kv_heads)
        loads = profile.relative * args.budget
        before = Planner(policy="contiguous", tp_size=plan.tp_size).from_expectation(loads)
    draw_plan(plan, out, loads, before)
    if args.json:
        print_json({"plan": args.plan, "png": str(out)})
    else:
        print(f"wrote {out}")
    return 0

# SPDX-License-Identifier: Apache-2.0
"""Flags, table and picture of ``fairkv bench --virtual``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairkv_sglang.bench.report import stacked_bars
from fairkv_sglang.bench.sizes import PRESETS, Link
from fairkv_sglang.bench.workload import from_flags, parse_ints, parse_names
from fairkv_sglang.cli.output import print_json, print_table, progress

COLUMNS = [
    "placement", "step ms", "tok/s", "speed-up", "weights", "KV", "MLP", "logits", "planning",
    "comm", "imbalance", "balance", "copies",
]  # fmt: skip
PARTS = (
    "attention_weights_ms", "attention_kv_ms", "mlp_ms", "logits_ms", "planning_ms",
    "all_reduce_ms",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of virtual ranks; --tp, --budgets, --prompt-len, --profile and --out hold as well."""
    add = parser.add_argument_group("virtual ranks").add_argument
    add("--virtual", action="store_true", help="time the ranks' shares on one device, no engine")
    add("--sizes", default="llama-3.1-8b", choices=tuple(PRESETS), help="model (8B)")
    add("--batch", default="64", metavar="N,N", help="requests decoding together (default 64)")
    add("--placements", default="all", help="policies, and rank_local (default all)")
    add("--layers", type=int, help="measure this many layers, evenly spaced (default all)")
    add("--repeats", type=int, default=5, help="measurements of each part (default 5)")
    add("--bandwidth", type=float, default=300.0, help="all-reduce model: GB/s per direction")
    add("--latency", type=float, default=10.0, help="all-reduce model: microseconds")
    add(
        "--cost",
        default="device",
        choices=("device", "bytes", "measured"),
        help="weigh copies as the engine does on this kind of device, by bytes alone, or by costs "
        "measured first",
    )
    add("--decode", default="auto", help="auto, numba, triton or flashinfer")


def run(args: argparse.Namespace) -> int:
    """Run, print, write."""
    from fairkv_sglang.bench.virtual import PLACEMENTS, VirtualSettings, run_virtual

    settings = from_flags(
        VirtualSettings,
        args,
        sizes=PRESETS[args.sizes],
        tp_sizes=parse_ints(args.tp, "--tp"),
        batches=parse_ints(args.batch, "--batch"),
        budgets=parse_ints(args.budgets or "1024", "--budgets"),
        prompt_len=max(parse_ints(args.prompt_len or "8192", "--prompt-len")),
        placements=parse_names(args.placements, PLACEMENTS, "--placements"),
        link=from_flags(Link, args, bandwidth_gb_s=args.bandwidth, latency_us=args.latency),
        dtype=args.dtype or "bfloat16",
    )
    with progress("placements", len(settings.cases()) * len(settings.placements)) as advance:

        def done(line: str) -> None:
            print(line, file=sys.stderr, flush=True)
            advance()

        result = run_virtual(settings, done)
    if args.out is not None:
        from fairkv_sglang.cli.bench import write

        write(result, args.out, args.name or "virtual")
        draw(result, args.out / f"{args.name or 'virtual'}.png")
    if args.json:
        print_json(result)
        return 0
    for case in result["cases"]:
        rows = [_row(name, entry) for name, entry in case["placements"].items()]
        print_table(_title(settings.sizes.name, case), COLUMNS, rows)
    return 0


def _title(model: str, case: Mapping[str, Any]) -> str:
    return f"{model}, TP {case['tp']}, batch {case['batch']}, {case['budget']} tokens per head (ms)"


def _row(name: str, entry: Mapping[str, Any]) -> list[str]:
    return [
        name,
        f"{entry['step_ms']:.2f}",
        f"{entry['tokens_per_s']:.0f}",
        f"{entry['speedup']:.3f}" if entry["speedup"] else "-",
        *(f"{entry['parts'][part]:.2f}" for part in PARTS),
        f"{entry['imbalance']:.3f}",
        f"{entry['balancedness']:.3f}",
        str(entry["copies"]),
    ]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The parts of a step, stacked, one row of bars per placement and case."""
    from matplotlib.figure import Figure  # slow to import

    cases = result["cases"]
    height = 0.8 + 0.35 * sum(len(case["placements"]) for case in cases) + 1.5 * len(cases)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for axis, case in zip(axes, cases, strict=True):
        entries = case["placements"].values()
        parts = {
            part.removesuffix("_ms").replace("_", " "): [entry["parts"][part] for entry in entries]
            for part in PARTS
        }
        stacked_bars(axis, list(case["placements"]), parts)
        axis.set_title(_title(result["settings"]["sizes"]["name"], case), fontsize=9, loc="left")
    axes[-1].set_xlabel("ms per decode step of the group")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=6)
    figure.savefig(path, dpi=120)

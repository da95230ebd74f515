# SPDX-License-Identifier: Apache-2.0
"""Table and picture of virtual ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairkv_sglang.bench.engine.report import Table, stacked_bars

COLUMNS = [
    "placement", "step ms", "tok/s", "speed-up", "weights", "KV", "MLP", "logits", "planning",
    "comm", "imbalance", "balance", "copies",
]  # fmt: skip
PARTS = (
    "attention_weights_ms", "attention_kv_ms", "mlp_ms", "logits_ms", "planning_ms",
    "all_reduce_ms",
)  # fmt: skip


def tables(result: Mapping[str, Any]) -> list[Table]:
    """``(title, columns, rows)`` of each case."""
    return [
        (_title(result, case), COLUMNS, [_row(n, e) for n, e in case["placements"].items()])
        for case in result["cases"]
    ]


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the table does not say."""
    return ["rank_local keeps other tokens: each rank has a budget of its own"]


def _title(result: Mapping[str, Any], case: Mapping[str, Any]) -> str:
    model = result["settings"]["model"]["name"]
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
        axis.set_title(_title(result, case), fontsize=9, loc="left")
    axes[-1].set_xlabel("ms per decode step of the group")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=6)
    figure.savefig(path, dpi=120)

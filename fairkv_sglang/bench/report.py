# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.bench.stats import show

THROUGHPUT = [
    "variant", "output tok/s", "vs stock", "all tok/s", "TTFT s", "ITL ms", "requests",
    "head pages MiB",
]  # fmt: skip
STEPS = [
    "variant", "decode step ms", "compute ms", "waiting ms", "kept tokens", "balance plan/run",
    "copies", "rows at home",
]  # fmt: skip
PREFILL = [
    "variant", "TTFT s", "over contiguous", "whole run s", "output tok/s over contiguous",
    "prefill s", "without FairKV's part", "of stock's", "FairKV's part", "handed over MB/prompt",
    "ms/prompt",
]  # fmt: skip
BALANCING = [
    "over contiguous", "speed-up", "allowed", "reached", "of gain", "CPU speed-up", "CPU allowed",
    "CPU of gain",
]  # fmt: skip


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """``(title, columns, rows)`` of each case: figures, then balancing."""
    shown = []
    for case in result["cases"]:
        title, variants = case_title(case), case["variants"].items()
        shown.append((title, THROUGHPUT, [_throughput(n, e, case) for n, e in variants]))
        shown.append((f"{title}: decode steps by rank", STEPS, [_steps(n, e) for n, e in variants]))
        shown.append((f"{title}: prefill", PREFILL, [_prefill(n, e, case) for n, e in variants]))
        rows = [_balance_row(name, entry) for name, entry in case["balancing"].items() if entry]
        if rows:
            shown.append((f"{title}: decode step, balancing", BALANCING, rows))
    return shown


def case_title(case: Mapping[str, Any]) -> str:
    """One line that says what a case is."""
    budget = f"{case['budget']} tokens" if "budget" in case else f"{case['ratio']:.0%} kept"
    return f"TP {case['tp']}, {budget}, {case['max_total_tokens']} tokens of KV memory"


def _figure(entry: Mapping[str, Any], metric: str, digits: int = 1, alone: bool = False) -> str:
    """A metric with its spread, or its median alone."""
    if metric not in entry["metrics"]:
        return "-"
    figure = entry["metrics"][metric]
    return f"{figure['median']:.{digits}f}" if alone else show(figure, digits)


def _by_rank(values: list[float] | None, digits: int = 1) -> str:
    return "/".join(f"{value:.{digits}f}" for value in values) if values else "-"


def _throughput(name: str, entry: Mapping[str, Any], case: Mapping[str, Any]) -> list[str]:
    against = case["ratios"].get("stock", {}).get("output_tokens_per_s", {}).get(name)
    memory = entry["memory"]
    return [
        name,
        _figure(entry, "output_tokens_per_s"),
        show(against) if against else "-",
        _figure(entry, "total_tokens_per_s", 0, alone=True),
        _figure(entry, "ttft_s", 2, alone=True),
        _figure(entry, "itl_ms", alone=True),
        _figure(entry, "peak_requests", 0, alone=True),
        f"{memory['page_bytes'] / 2**20:.0f}" if "page_bytes" in memory else "-",
    ]


def _steps(name: str, entry: Mapping[str, Any]) -> list[str]:
    ranks, plan = entry["ranks"], entry["plan"]
    planned, found = plan.get("planned_balancedness"), entry["metrics"].get("balancedness")
    return [
        name,
        _figure(entry, "decode_period_ms"),
        _by_rank(ranks.get("compute_ms")),
        _by_rank(ranks.get("waiting_ms")),
        _by_rank(ranks.get("rank_tokens"), 0),
        f"{planned:.3f}/{found['median']:.3f}" if planned and found else "-",
        str(plan.get("copies", "-")),
        f"{plan['home_rows']:.0%}" if plan.get("home_rows") is not None else "-",
    ]


def _prefill(name: str, entry: Mapping[str, Any], case: Mapping[str, Any]) -> list[str]:
    def ratio(base: str, metric: str) -> str:
        found = case["ratios"].get(base, {}).get(metric, {}).get(name)
        return show(found, 3) if found else "-"

    metrics = entry["metrics"]
    return [
        name,
        _figure(entry, "ttft_s", 2),
        ratio("contiguous", "ttft_s"),
        _figure(entry, "seconds"),
        ratio("contiguous", "output_tokens_per_s"),
        _figure(entry, "prefill_s"),
        _figure(entry, "prefill_own_s"),
        ratio("stock", "prefill_own_s"),
        f"{metrics['compress_share']['median']:.1%}" if "compress_share" in metrics else "-",
        _figure(entry, "hand_over_mb_per_prompt"),
        _figure(entry, "hand_over_ms_per_prompt"),
    ]


def _balance_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    def share(key: str) -> str:
        return "-" if entry[key] is None else f"{entry[key]:.2f}"

    spreads = [show(entry[key], 3) for key in ("speedup", "allowed", "reached")]
    of_cpu = [show(entry[key], 3) for key in ("cpu_speedup", "cpu_allowed")]
    return [name, *spreads, share("reached_gain"), *of_cpu, share("cpu_reached_gain")]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Throughput of every variant and where a rank's decode step goes, one row per case."""
    from matplotlib.figure import Figure  # slow to import

    cases = result["cases"]
    figure = Figure(figsize=(11, 3.2 * len(cases)), layout="constrained")
    for row, case in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        _draw_rates(row[0], case)
        _draw_steps(row[1], case)
    figure.savefig(path, dpi=120)


def stacked_bars(
    axis: Any, names: Sequence[str], parts: Mapping[str, Sequence[float]], *colours: str
) -> None:
    """A bar for each name, first on top, made of labelled parts."""
    left = np.zeros(len(names))
    for (label, values), colour in zip_longest(parts.items(), colours):
        axis.barh(names, values, left=left, color=colour, label=label)
        left += values
    axis.invert_yaxis()


def _draw_rates(axis: Any, case: Mapping[str, Any]) -> None:
    names = list(case["variants"])
    rates = [case["variants"][name]["metrics"]["output_tokens_per_s"] for name in names]
    medians = [rate["median"] for rate in rates]
    low = [rate["median"] - rate["least"] for rate in rates]
    high = [rate["most"] - rate["median"] for rate in rates]
    axis.barh(names, medians, xerr=[low, high], color="tab:blue", capsize=3)
    axis.invert_yaxis()
    axis.set_xlabel("output tokens/s: median, least and most")
    axis.set_title(case_title(case), fontsize=9, loc="left")


def _draw_steps(axis: Any, case: Mapping[str, Any]) -> None:
    labels, compute, waiting, rest = [], [], [], []
    for name, entry in case["variants"].items():
        ranks, metrics = entry["ranks"], entry["metrics"]
        if "compute_ms" not in ranks or "decode_period_ms" not in metrics:
            continue
        for rank, (busy, wait) in enumerate(
            zip(ranks["compute_ms"], ranks["waiting_ms"], strict=True)
        ):
            labels.append(f"{name} {rank}")
            compute.append(busy)
            waiting.append(wait)
            rest.append(max(metrics["decode_period_ms"]["median"] - busy - wait, 0.0))
    parts = {"compute": compute, "waiting": waiting, "communication, scheduling": rest}
    stacked_bars(axis, labels, parts, "tab:blue", "tab:red", "lightgrey")
    axis.tick_params(axis="y", labelsize=7)
    axis.set_xlabel("ms per decode step, by rank")
    if labels:
        axis.legend(fontsize=7)

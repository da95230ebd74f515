# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of a result: the whole run first, its parts after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.bench.stats import show

Table = tuple[str, list[str], list[list[str]]]

Cell = Callable[[str, Mapping[str, Any], Mapping[str, Any]], str]
"""Text of a cell from a variant's name, its entry, and the case."""


def figure(metric: str, digits: int = 1, alone: bool = False) -> Cell:
    """A metric with its spread, or its median alone."""

    def cell(name: str, entry: Mapping[str, Any], case: Mapping[str, Any]) -> str:
        if (found := entry["metrics"].get(metric)) is None:
            return "-"
        return f"{found['median']:.{digits}f}" if alone else show(found, digits)

    return cell


def over(base: str, metric: str) -> Cell:
    """Ratio to the same round's run of another variant."""

    def cell(name: str, entry: Mapping[str, Any], case: Mapping[str, Any]) -> str:
        found = case["ratios"].get(base, {}).get(metric, {}).get(name)
        return show(found) if found else "-"

    return cell


def balancing(key: str) -> Cell:
    """What balancing gave over contiguous; a spread or a share."""

    def cell(name: str, entry: Mapping[str, Any], case: Mapping[str, Any]) -> str:
        found = (case["balancing"].get(name) or {}).get(key)
        return (
            "-" if found is None else show(found, 3) if isinstance(found, dict) else f"{found:.2f}"
        )

    return cell


def of(part: str, key: str, form: str, scale: float = 1.0) -> Cell:
    """A value of a part of the entry; lists are by rank."""

    def cell(name: str, entry: Mapping[str, Any], case: Mapping[str, Any]) -> str:
        if (found := entry[part].get(key)) is None:
            return "-"
        values = found if isinstance(found, list) else [found]
        return "/".join(format(value * scale, form) for value in values)

    return cell


TABLES: dict[str, dict[str, Cell]] = {
    "whole run, first token included": {
        "tokens/s": figure("output_tokens_per_s"),
        "over stock": over("stock", "output_tokens_per_s"),
        "over contiguous": over("contiguous", "output_tokens_per_s"),
        "run s": figure("seconds"),
        "TTFT s": figure("ttft_s", 2, alone=True),
        "ITL ms": figure("itl_ms", alone=True),
        "requests at once": figure("peak_requests", 0, alone=True),
        "head pages MiB": of("memory", "page_bytes", ".0f", 2**-20),
    },
    "part of it, a decode step by rank": {
        "decode step ms": figure("decode_period_ms"),
        "compute ms": of("ranks", "compute_ms", ".1f"),
        "waiting ms": of("ranks", "waiting_ms", ".1f"),
        "kept tokens": of("ranks", "rank_tokens", ".0f"),
        "balance": figure("balancedness", 3, alone=True),
        "planned": of("plan", "planned_balancedness", ".3f"),
        "copies": of("plan", "copies", ".0f"),
        "rows at home": of("plan", "home_rows", ".0%"),
    },
    "part of it, prefill": {
        "TTFT over contiguous": over("contiguous", "ttft_s"),
        "prefill s": figure("prefill_s"),
        "without FairKV's part": figure("prefill_own_s"),
        "of stock's": over("stock", "prefill_own_s"),
        "FairKV's part, %": figure("compress_percent"),
        "handed over MB/prompt": figure("hand_over_mb_per_prompt"),
        "ms/prompt": figure("hand_over_ms_per_prompt"),
    },
    "part of it, balancing a decode step": {
        "speed-up": balancing("speedup"),
        "allowed": balancing("allowed"),
        "reached": balancing("reached"),
        "of gain": balancing("reached_gain"),
        "CPU speed-up": balancing("cpu_speedup"),
        "CPU allowed": balancing("cpu_allowed"),
        "CPU of gain": balancing("cpu_reached_gain"),
    },
}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """``(title, columns, rows)`` of each case."""
    shown: list[Table] = []
    for case in result["cases"]:
        for text, columns in TABLES.items():
            title = f"{result['model']}, random weights\n{case_title(case)}: {text}"
            rows = [
                [name, *(cell(name, entry, case) for cell in columns.values())]
                for name, entry in case["variants"].items()
            ]
            shown.append((title, ["variant", *columns], rows))
    return shown


def notes(result: Mapping[str, Any]) -> list[str]:
    """What each variant is, one line each."""
    texts = {n: e["text"] for case in result["cases"] for n, e in case["variants"].items()}
    return [f"{name}: {text}" for name, text in texts.items()]


def case_title(case: Mapping[str, Any]) -> str:
    """One line that says what a case is."""
    budget = f"{case['budget']} tokens" if "budget" in case else f"{case['ratio']:.0%} kept"
    return f"TP {case['tp']}, {budget}, {case['max_total_tokens']} tokens of KV memory"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Throughput of every variant and where a rank's decode step goes, one row per case."""
    from matplotlib.figure import Figure  # slow to import

    cases = result["cases"]
    figure = Figure(figsize=(11, 3.4 * len(cases) + 0.3), layout="constrained")
    figure.suptitle(f"{result['model']}, random weights", fontsize=9)
    for row, case in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        _draw_rates(row[0], case)
        _draw_steps(row[1], case)
    figure.savefig(path, dpi=120)


def stacked_bars(
    axis: Any, names: Sequence[str], parts: Mapping[str, Sequence[float]], *colours: str
) -> None:
    """A bar for each name, first on top, made of labelled parts; the legend is beside them."""
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
    axis.set_xlabel("output tokens/s of the whole run: median, least and most")
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
    axis.set_xlabel("part of it: ms per decode step, by rank")
    if labels:
        axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

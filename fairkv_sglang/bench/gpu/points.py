# SPDX-License-Identifier: Apache-2.0
"""Points of the bandwidth benchmark and the tables that show them; needs no GPU.

A point is one number of rows and one kind of lengths. Its `kernels` hold for each name of
`CONTENDERS` either figures or, as text, why there are none ("not run: ...", "failed: ...").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fairkv_sglang.bench.gpu.contenders import CONTENDERS, VARIANTS
from fairkv_sglang.bench.gpu.report import table
from fairkv_sglang.kernels import PAGE_TOKENS
from fairkv_sglang.kernels.plan import plan_tiles
from fairkv_sglang.kernels.workload import lengths

SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""Rows B' of a layer: requests times heads of a rank."""
MEAN, DIM, GROUP = 1024, 128, 4
ROW_BYTES = 2 * DIM * 2
"""K and V of one token in bfloat16."""
POINT_BYTES = 1 << 29
"""Bytes of all layers of a point, several times what an L2 cache holds."""
SPARE_TILES = 264
"""Two for each of an H200's 132 multiprocessors; the tables' column `tiles` is for these."""


def layers_of(rows: int) -> int:
    """Layers of a point, so that its bytes do not fit the L2 cache."""
    return max(2, POINT_BYTES // (rows * MEAN * ROW_BYTES))


def problem(rows: int, kind: str, mean: int = MEAN) -> tuple[torch.Tensor, dict[str, Any]]:
    """Lengths [rows, layers] of a point and what can be said of them without a GPU.

    All kinds of a size hold the same number of tokens in every layer.
    """
    layers = layers_of(rows)
    lens = torch.stack([lengths(kind, rows, mean, seed) for seed in range(layers)], 1)
    tiles = plan_tiles(lens.t(), SPARE_TILES)
    held = (lens + (PAGE_TOKENS - 1)) // PAGE_TOKENS
    return lens, {
        "rows": rows, "lengths": kind, "group": GROUP, "layers": layers, "mean": mean,
        "longest": int(lens.max()), "chunk": int(tiles.chunk[0]),
        "tiles": int(tiles.valid.sum(1).max()), "tiles_at_most": rows + SPARE_TILES,
        "page_overhead": float(held.sum() * PAGE_TOKENS / lens.sum()), "kernels": {},
    }  # fmt: skip


def over_uniform(points: list[dict[str, Any]]) -> None:
    """Add each kernel's time over its own time for uniform lengths; the bytes are equal."""
    base = {p["rows"]: p["kernels"] for p in points if p["lengths"] == "uniform"}
    for point in points:
        for name, figures in point["kernels"].items():
            even = base.get(point["rows"], {}).get(name)
            if isinstance(figures, dict) and isinstance(even, dict):
                figures["over_uniform"] = figures["us_per_layer"] / even["us_per_layer"]


def _bandwidth(figures: dict[str, Any] | str) -> str:
    if isinstance(figures, str):
        return figures.split(":")[0]
    ratio = figures.get("over_uniform")
    return f"{figures['of_copy']:.2f}" + (f" /{ratio:5.2f}" if ratio else "")


def _planning(figures: dict[str, Any] | str) -> str:
    if isinstance(figures, str):
        return figures.split(":")[0]
    for place in ("host", "device"):
        if f"{place}_plan_us_per_layer" in figures:
            return f"{place} {figures[f'{place}_plan_us_per_layer']:.0f}"
    return "none"


def point_line(point: dict[str, Any]) -> str:
    """One line while the benchmark runs."""
    figures = (f"{name} {_bandwidth(x)}" for name, x in point["kernels"].items())
    return f"B' {point['rows']:5} {point['lengths']:10}" + ", ".join(figures)


def bandwidth_table(points: list[dict[str, Any]]) -> str:
    """Fraction of the copy bandwidth and, behind the stroke, time over uniform lengths."""
    columns = ["B'", "lengths", "layers", "longest", "tiles", "pages/tokens", *CONTENDERS]
    rows = [
        [
            str(p["rows"]), p["lengths"], str(p["layers"]), str(p["longest"]), str(p["tiles"]),
            f"{p['page_overhead']:.3f}",
            *(_bandwidth(p["kernels"].get(name, "not run")) for name in CONTENDERS),
        ]
        for p in points
    ]  # fmt: skip
    return "\n".join([table(columns, rows), *_reasons(points), *_extremes(points)])


def planning_table(points: list[dict[str, Any]]) -> str:
    """Microseconds of planning for one layer, and whether the host or the device spends them.

    The device's part is in the CUDA graph of the step: it costs the host nothing.
    """
    names = [name for name in CONTENDERS if name not in VARIANTS]
    rows = [
        [str(p["rows"]), p["lengths"], *(_planning(p["kernels"].get(n, "not run")) for n in names)]
        for p in points
    ]
    return table(["B'", "lengths", *names], rows)


def _reasons(points: list[dict[str, Any]]) -> list[str]:
    """Why kernels have no figures; each reason once for all sizes and kernels."""
    names: dict[str, dict[str, None]] = {}
    for point in points:
        for name, figures in point["kernels"].items():
            if isinstance(figures, str):
                names.setdefault(figures, {})[name] = None
    every = len(CONTENDERS)
    return [
        f"{'all kernels' if len(which) == every else ', '.join(which)}: {reason}"
        for reason, which in names.items()
    ]


def _extremes(points: list[dict[str, Any]]) -> list[str]:
    """The figures of ours that decide: the lowest bandwidth, the highest cost of uneven lengths."""
    ours = [(p, p["kernels"].get("ours")) for p in points]
    measured = [(p, x) for p, x in ours if isinstance(x, dict)]
    if not measured:
        return []

    def line(
        text: str, key: str, pick: Callable[..., tuple[dict[str, Any], dict[str, Any]]]
    ) -> str:
        point, figures = pick(measured, key=lambda pair: float(pair[1].get(key, 1.0)))
        place = f"B' {point['rows']}, {point['lengths']}"
        return f"ours, {text}: {figures.get(key, 1.0):.2f} ({place})"

    return [
        line("lowest fraction of copy bandwidth", "of_copy", min),
        line("longest time over uniform lengths", "over_uniform", max),
    ]

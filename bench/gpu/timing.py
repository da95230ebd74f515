# SPDX-License-Identifier: Apache-2.0
"""Decode bandwidth of ragged against uniform batches of equal bytes, and the cost of planning.

A point is one number of rows B' and one kind of lengths. Its `kernels` hold for each contender
either figures or, as text, why there are none ("not run: ...", "failed: ..."). UNTESTED ON A GPU:
the tests run it with a clock that does not measure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fairkv_sglang.bench.clocks import Clock
from fairkv_sglang.bench.gpu.contenders import Maker
from fairkv_sglang.bench.gpu.report import NotRun, table
from fairkv_sglang.bench.resident import KINDS, lengths, resident
from fairkv_sglang.kernels import PAGE_TOKENS

SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""Rows B' of a layer: requests times heads of a rank."""
MEAN, DIM, GROUP = 1024, 128, 4
POINT_BYTES = 1 << 29
"""Bytes of all layers of a point, several times what an L2 cache holds."""

Makers = Mapping[str, Maker | str]
"""By name; a text says why the kernel is left out."""
Point = dict[str, Any]


def problem(rows: int, kind: str, mean: int = MEAN, dim: int = DIM) -> tuple[torch.Tensor, Point]:
    """Lengths [rows, layers] of a point and what can be said of them without a GPU.

    All kinds of a size hold the same number of tokens in every layer.
    """
    layers = max(2, POINT_BYTES // (rows * MEAN * 4 * dim))
    lens = torch.stack([lengths(kind, rows, mean, seed) for seed in range(layers)], 1)
    held = (lens + (PAGE_TOKENS - 1)) // PAGE_TOKENS
    return lens, {
        "rows": rows, "lengths": kind, "group": GROUP, "layers": layers, "mean": mean,
        "longest": int(lens.max()), "bytes": int(lens.sum()) * 4 * dim,
        "page_overhead": float(held.sum() * PAGE_TOKENS / lens.sum()), "kernels": {},
    }  # fmt: skip


def bandwidth(
    rows: int,
    kind: str,
    peak: float,
    clock: Clock,
    makers: Makers,
    mean: int = MEAN,
    dim: int = DIM,
) -> Point:
    """One point: every kernel on the same pages, all layers in one graph."""
    lens, point = problem(rows, kind, mean, dim)
    pages = resident(lens, dim, torch.bfloat16, clock.device, by_columns=False)
    q = torch.randn((rows, GROUP, dim), device=clock.device).bfloat16()
    out, layers = torch.empty_like(q), int(point["layers"])

    def measure(maker: Maker | str) -> dict[str, Any] | str:
        if isinstance(maker, str):
            return maker
        try:
            contender = maker(pages, GROUP, 0.1)
            if contender.plan is not None:
                contender.plan()
            ms = clock.ms(lambda: [contender.run(layer, q, out) for layer in range(layers)])
            speed = point["bytes"] / ms * 1e3
            figures: dict[str, Any] = {"us_per_layer": ms * 1e3 / layers, "of_copy": speed / peak}
            if contender.plan is not None:
                on_host = contender.plans_on == "host"
                us = clock.host_us(contender.plan) if on_host else clock.ms(contender.plan) * 1e3
                figures["plan_us_per_layer"] = us / layers
                figures["plans_on"] = contender.plans_on
            return figures
        except NotRun as reason:
            return f"not run: {reason}"
        except Exception as error:  # the other kernels still count
            first = (str(error).splitlines() or [""])[0]
            return f"failed: {type(error).__name__}: {first[:200]}"

    point["kernels"] = {name: measure(maker) for name, maker in makers.items()}
    return point


def copy_bandwidth(clock: Clock) -> float:
    """Bytes/s, read plus written, of a device copy."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=clock.device)
    b = torch.empty_like(a)
    return 2 * a.numel() / clock.ms(lambda: b.copy_(a)) * 1e3


def sweep(
    clock: Clock, makers: Makers, has_time: Callable[[], bool], sizes: tuple[int, ...] = SIZES
) -> dict[str, Any]:
    """Copy bandwidth in bytes/s and all points that there is time for, printed on the way."""
    peak, points = copy_bandwidth(clock), list[Point]()
    print(f"device copy: {peak / 1e12:.2f} TB/s, read and written", flush=True)
    for rows, kind in itertools.product(sizes, KINDS):
        if not has_time():
            print("the rest of the points: not run: out of time")
            break
        points.append(bandwidth(rows, kind, peak, clock, makers))
        print(f"  {point_line(points[-1])}", flush=True)
    over_uniform(points)
    return {"copy_bytes_per_s": peak, "bandwidth": points}


def planner(
    clock: Clock, layers: int = 80, bs: int = 64, heads: int = 8, dim: int = DIM, **options: Any
) -> dict[str, float]:
    """Device time of one plan of a large model, and the host's time where it is not captured."""
    from fairkv_sglang.kernels.cuda.flashinfer import FlashInferDecoder

    lanes = layers * heads
    pages = resident(
        torch.full((bs, lanes), 65), dim, torch.bfloat16, clock.device, by_columns=False
    )
    starts = list(range(0, lanes + 1, heads))
    decoder = FlashInferDecoder(pages, starts, GROUP, 0.1, **options)
    rows = torch.arange(1, bs + 1, device=clock.device)
    slots = torch.empty((bs, lanes), dtype=torch.int64, device=clock.device)
    result = {
        "plan_us": clock.ms(lambda: decoder.plan(rows)) * 1e3,
        "grow_us": clock.ms(lambda: decoder.pages.kernels.grow(pages, rows, slots)) * 1e3,
        "plan_host_us_uncaptured": clock.host_us(lambda: decoder.plan(rows)),
    }
    pages.check_integrity()
    return result


def over_uniform(points: list[Point]) -> None:
    """Add each kernel's time over its own time for uniform lengths; the bytes are equal."""
    base = {p["rows"]: p["kernels"] for p in points if p["lengths"] == "uniform"}
    for point in points:
        for name, figures in point["kernels"].items():
            even = base.get(point["rows"], {}).get(name)
            if isinstance(figures, dict) and isinstance(even, dict):
                figures["over_uniform"] = figures["us_per_layer"] / even["us_per_layer"]


def _cells(figures: dict[str, Any] | str) -> tuple[str, str]:
    """Fraction of the copy bandwidth with, behind the stroke, time over uniform lengths; planning
    of one layer in microseconds, and who spends them.
    """
    if isinstance(figures, str):
        return figures.split(":")[0], "-"
    ratio, us = figures.get("over_uniform"), figures.get("plan_us_per_layer")
    bandwidth = f"{figures['of_copy']:.2f}" + (f" /{ratio:5.2f}" if ratio else "")
    return bandwidth, "none" if us is None else f"{figures['plans_on']} {us:.0f}"


def point_line(point: Point) -> str:
    """One line while the benchmark runs."""
    figures = (f"{name} {_cells(x)[0]}" for name, x in point["kernels"].items())
    return f"B' {point['rows']:5} {point['lengths']:10}" + ", ".join(figures)


def tables(points: list[Point]) -> str:
    """Bandwidth and planning (the device's part is in the CUDA graph of the step), why kernels have
    no figures, and the longest time of ours over uniform lengths.
    """
    names = list(points[0]["kernels"])
    columns = ["B'", "lengths", "layers", "longest", "pages/tokens", *names]
    columns += [f"planning, {name}" for name in names]
    rows = []
    for p in points:
        bandwidth, planning = zip(*(_cells(p["kernels"][name]) for name in names), strict=True)
        known = [str(p[key]) for key in ("rows", "lengths", "layers", "longest")]
        rows.append([*known, f"{p['page_overhead']:.3f}", *bandwidth, *planning])
    kernels = [(name, x) for p in points for name, x in p["kernels"].items()]
    reasons = {f"{name}: {x}" for name, x in kernels if isinstance(x, str)}
    ours = [x for name, x in kernels if name == "ours" and isinstance(x, dict)]
    uneven = [x.get("over_uniform", 1.0) for x in ours]
    lines = [table(columns, rows), *sorted(reasons)]
    if uneven:
        lines.append(f"ours, longest time over uniform lengths: {max(uneven):.2f}")
    return "\n".join(lines)

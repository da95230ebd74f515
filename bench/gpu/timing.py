# SPDX-License-Identifier: Apache-2.0
"""Decode bandwidth of ragged against uniform batches of equal bytes.

A point is one number of rows B', one kind of lengths, one mean and one group size. Its `kernels`
hold for each contender either figures or, as text, why there are none ("not run: ...", "failed:
..."). UNTESTED ON A GPU: the tests run it with a clock that does not measure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fairkv_sglang.bench.clocks import Clock
from fairkv_sglang.bench.gpu.contenders import Maker
from fairkv_sglang.bench.gpu.report import NotRun
from fairkv_sglang.bench.gpu.step import healthy
from fairkv_sglang.bench.resident import KINDS, lengths, resident
from fairkv_sglang.kernels import PAGE_TOKENS

SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""Rows B' of a layer: requests times heads of a rank."""
MEAN, DIM, GROUP = 1024, 128, 4
MEANS, GROUPS, OTHERS = (128, 512, 2048), (1, 4, 8, 16), 512
"""Kept tokens and query heads of a row of the points beside those of `SIZES`, and their rows."""
POINT_BYTES = 1 << 29
"""Bytes of all layers of a point, several times what an L2 cache holds."""

Makers = Mapping[str, Maker | str]
"""By name; a text says why the kernel is left out."""
Point = dict[str, Any]


def problem(
    rows: int, kind: str, mean: int = MEAN, dim: int = DIM, group: int = GROUP
) -> tuple[torch.Tensor, Point]:
    """Lengths [rows, layers] of a point and what can be said of them without a GPU.

    All kinds of a size hold the same number of tokens in every layer.
    """
    layers = max(2, POINT_BYTES // (rows * MEAN * 4 * dim))
    lens = torch.stack([lengths(kind, rows, mean, seed) for seed in range(layers)], 1)
    held = (lens + (PAGE_TOKENS - 1)) // PAGE_TOKENS
    return lens, {
        "rows": rows, "lengths": kind, "group": group, "layers": layers, "mean": mean,
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
    group: int = GROUP,
    dim: int = DIM,
) -> Point:
    """One point: every kernel on the same pages, all layers in one graph."""
    lens, point = problem(rows, kind, mean, dim, group)
    pages = resident(lens, dim, torch.bfloat16, clock.device, by_columns=False)
    q = torch.randn((rows, group, dim), device=clock.device).bfloat16()
    out, layers = torch.empty_like(q), int(point["layers"])

    def measure(maker: Maker | str) -> dict[str, Any] | str:
        if isinstance(maker, str):
            return maker
        try:
            contender = maker(pages, group, 0.1)
            if contender.plan is not None:
                contender.plan()
            ms = clock.ms(lambda: [contender.run(layer, q, out) for layer in range(layers)])
            healthy(pages)
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


def problems() -> list[tuple[int, str, int, int]]:
    """Rows, kind of lengths, mean and group of every point; sizes first."""
    sizes = itertools.product(SIZES, KINDS, (MEAN,), (GROUP,))
    return [*sizes, *itertools.product((OTHERS,), KINDS[:2], MEANS, GROUPS)]


def sweep(clock: Clock, makers: Makers, has_time: Callable[[], bool]) -> dict[str, Any]:
    """Copy bandwidth in bytes/s and all points that there is time for, printed on the way."""
    peak, points = copy_bandwidth(clock), list[Point]()
    print(f"device copy: {peak / 1e12:.2f} TB/s, read and written", flush=True)
    for rows, kind, mean, group in problems():
        if not has_time():
            print("the rest of the points: not run: out of time")
            break
        points.append(bandwidth(rows, kind, peak, clock, makers, mean, group))
        over_uniform(points)
        print(f"  {point_line(points[-1])}", flush=True)
    return {"copy_bytes_per_s": peak, "bandwidth": points}


def over_uniform(points: list[Point]) -> None:
    """Add each kernel's time over its own time for uniform lengths; the bytes are equal."""
    same = ("rows", "mean", "group")
    uniform = [p for p in points if p["lengths"] == "uniform"]
    base = {tuple(p[key] for key in same): p["kernels"] for p in uniform}
    for point in points:
        for name, figures in point["kernels"].items():
            even = base.get(tuple(point[key] for key in same), {}).get(name)
            if isinstance(figures, dict) and isinstance(even, dict):
                figures["over_uniform"] = figures["us_per_layer"] / even["us_per_layer"]


def point_line(point: Point) -> str:
    """Each kernel's fraction of the copy bandwidth, its time over uniform lengths, and the
    microseconds that planning of a layer takes where it is planned.
    """

    def cell(figures: dict[str, Any] | str) -> str:
        if isinstance(figures, str):
            return figures
        ratio = f" /{figures['over_uniform']:5.2f}" if "over_uniform" in figures else ""
        us = figures.get("plan_us_per_layer")
        plan = "" if us is None else f" ({figures['plans_on']} plan {us:.0f} us)"
        return f"{figures['of_copy']:.2f}{ratio}{plan}"

    shape = f"B' {point['rows']:5} mean {point['mean']:4} group {point['group']:2} "
    kernels = (f"{name} {cell(figures)}" for name, figures in point["kernels"].items())
    return f"{shape}{point['lengths']:10}" + ", ".join(kernels)


def worst(points: list[Point]) -> str:
    """Longest time of ours over uniform lengths."""
    ours = [p["kernels"]["ours"] for p in points if isinstance(p["kernels"].get("ours"), dict)]
    longest = max((x.get("over_uniform", 1.0) for x in ours), default=None)
    return "" if longest is None else f"ours, longest time over uniform lengths: {longest:.2f}"

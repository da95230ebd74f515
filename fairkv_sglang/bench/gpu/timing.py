# SPDX-License-Identifier: Apache-2.0
"""Decode bandwidth of ragged against uniform batches of equal bytes, and the cost of planning.

UNTESTED ON A GPU: the tests run it with a clock that does not measure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fairkv_sglang.bench.clocks import Clock
from fairkv_sglang.bench.gpu.contenders import Contender, Maker
from fairkv_sglang.bench.gpu.points import DIM, GROUP, MEAN, ROW_BYTES, SIZES, point_line, problem
from fairkv_sglang.bench.gpu.report import NotRun
from fairkv_sglang.kernels import triton_ops
from fairkv_sglang.kernels.flashinfer_decode import FlashInferDecode
from fairkv_sglang.kernels.workload import KINDS, resident

Makers = Mapping[str, Maker | str]
"""By name; a text says why the kernel is left out."""


def copy_bandwidth(clock: Clock) -> float:
    """Bytes/s, read plus written, of a device copy."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=clock.device)
    b = torch.empty_like(a)
    return 2 * a.numel() / clock.ms(lambda: b.copy_(a)) * 1e3


def bandwidth(
    rows: int, kind: str, peak: float, clock: Clock, makers: Makers, mean: int = MEAN
) -> dict[str, Any]:
    """One (B', lengths) point: every kernel on the same pages, all layers in one graph."""
    lens, point = problem(rows, kind, mean)
    pages = resident(lens, DIM, torch.bfloat16, clock.device, by_columns=False)
    q = torch.randn((rows, GROUP, DIM), device=clock.device).bfloat16()
    out, layers = torch.empty_like(q), int(point["layers"])
    size = float(lens.sum()) * ROW_BYTES

    def once(contender: Contender) -> None:
        for layer in range(layers):
            contender.run(layer, q, out)

    def measure(maker: Maker | str) -> dict[str, Any] | str:
        if isinstance(maker, str):
            return maker
        try:
            contender = maker(pages, GROUP, 0.1)
            contender.plan()
            ms = clock.ms(lambda: once(contender))
            figures = {"us_per_layer": ms * 1e3 / layers, "of_copy": size / ms * 1e3 / peak}
            if contender.plans_on_host:
                figures["host_plan_us_per_layer"] = clock.host_us(contender.plan) / layers
            elif type(contender).plan is not Contender.plan:
                figures["device_plan_us_per_layer"] = clock.ms(contender.plan) * 1e3 / layers
            return figures
        except NotRun as reason:
            return f"not run: {reason}"
        except Exception as error:  # the other kernels still count
            first = (str(error).splitlines() or [""])[0]
            return f"failed: {type(error).__name__}: {first[:200]}"

    point["kernels"] = {name: measure(maker) for name, maker in makers.items()}
    return point


def planner(
    clock: Clock, layers: int = 80, bs: int = 64, heads: int = 8, **options: Any
) -> dict[str, Any]:
    """Device time of one plan of a large model, and the host's time where it is not captured."""
    lanes = layers * heads
    lens = torch.full((bs, lanes), 65)
    pages = resident(lens, DIM, torch.bfloat16, clock.device, by_columns=False)
    starts = list(range(0, lanes + 1, heads))
    runner = FlashInferDecode(pages, bs, starts, GROUP, 0.1, **options)
    rows = torch.arange(1, bs + 1, device=clock.device)
    slots = torch.empty((bs, lanes), dtype=torch.int64, device=clock.device)
    result = {
        "layers": layers, "rows_per_layer": bs * heads,
        "plan_us": clock.ms(lambda: runner.plan(rows)) * 1e3,
        "grow_us": clock.ms(lambda: triton_ops.grow(pages, rows, slots)) * 1e3,
        "plan_host_us_uncaptured": clock.host_us(lambda: runner.plan(rows)),
    }  # fmt: skip
    pages.check_integrity()
    return result


def sweep(
    clock: Clock, makers: Makers, has_time: Callable[[], bool]
) -> tuple[float, list[dict[str, Any]]]:
    """Copy bandwidth in bytes/s and all points that there is time for, printed on the way."""
    peak, points = copy_bandwidth(clock), []
    print(f"device copy: {peak / 1e12:.2f} TB/s, read and written", flush=True)
    for rows, kind in itertools.product(SIZES, KINDS):
        if not has_time():
            print("the rest of the points: not run: out of time")
            break
        points.append(bandwidth(rows, kind, peak, clock, makers))
        print(f"  {point_line(points[-1])}", flush=True)
    return peak, points

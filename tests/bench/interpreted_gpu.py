# SPDX-License-Identifier: Apache-2.0
"""Checks and timings of gpu_check on CPU tensors; run by test_gpu_check.py with TRITON_INTERPRET=1.

Triton's kernels are interpreted and a model stands for FlashInfer's. Figures mean nothing here: the
clock calls the work and answers a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fairkv_sglang.bench.clocks import captured
from fairkv_sglang.bench.gpu import timing
from fairkv_sglang.bench.gpu.contenders import CONTENDERS, Maker, ours, triton
from fairkv_sglang.kernels.cuda import operations as triton_ops
from fairkv_sglang.kernels.cuda.score import snapkv_score
from fairkv_tests import fake_flashinfer, gpu_checks, gpu_steps
from fairkv_tests.flashinfer_model import FlashInferModel

MODEL: dict[str, Any] = {"module": FlashInferModel(), "spare": 9}
SMALL: dict[str, Any] = {"lens": gpu_checks.SHORT, "groups": (1, 5), "by_columns": False}


class NoClock:
    device = "cpu"

    def ms(self, work: Callable[[], object], capture: bool = True) -> float:
        captured(work, self.device)()
        return 2.0

    def host_us(self, work: Callable[[], object]) -> float:
        work()
        return 5.0


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flashinfer.install(monkeypatch)
    monkeypatch.setattr(timing, "POINT_BYTES", 1)  # two layers


def makers() -> dict[str, Maker | str]:
    return {**CONTENDERS, "ours": partial(ours, **MODEL), "other": "not run: no reason"}


def test_operations_on_pages() -> None:
    f32 = torch.float32
    gpu_checks.page_operations(triton_ops, "cpu", f32, by_columns=False, rounds=1)
    gpu_checks.full_arena(triton_ops, "cpu", False)
    gpu_checks.snapkv_equals_torch(snapkv_score, "cpu")
    gpu_checks.golden_plan("cpu")
    gpu_checks.random_plans("cpu", rounds=4)


def test_decode() -> None:
    triton, planned = triton_ops.decode, gpu_steps.planned_decode(**MODEL)
    gpu_checks.decode_equals_torch(triton, "cpu", torch.float32, 3e-6, 24, **SMALL)
    gpu_checks.decode_equals_torch(planned, "cpu", torch.bfloat16, 1e-2, 32, **SMALL)
    gpu_steps.replayed_step("cpu", 32, rounds=1, **MODEL)
    gpu_steps.orders_agree("cpu", 32, module=MODEL["module"])


def test_our_contenders_equal_torch() -> None:
    gpu_checks.contender_equals_torch(partial(ours, **MODEL), "cpu", torch.bfloat16, 1e-2, 32)
    # The interpreter's dot product takes bfloat16 for integers.
    gpu_checks.contender_equals_torch(triton, "cpu", torch.float32, 1e-5, 32)


def test_a_point_has_figures_of_every_kernel() -> None:
    clock = NoClock()
    point = timing.bandwidth(6, "heavy", 1e9, clock, makers(), mean=20, dim=32)
    figures = {name: x for name, x in point["kernels"].items() if not isinstance(x, str)}
    assert set(point["kernels"]) - set(figures) == {"other"}
    size = 2 * 6 * 20 * 128
    for name, x in figures.items():
        assert x["us_per_layer"] == pytest.approx(1000)
        assert x["of_copy"] == pytest.approx(size / 2e-3 / 1e9)
        planned = {x["plans_on"]} if "plans_on" in x else set()
        assert planned == {"ours": {"device"}, "stock": {"host"}, "our Triton": set()}[name]
    assert "failed" not in timing.tables([point])


def test_a_kernel_that_breaks_does_not_stop_the_others() -> None:
    def breaks(*_: object) -> Any:
        raise RuntimeError("first line\nsecond line")

    mixed: dict[str, Maker | str] = {"stock": breaks, "our Triton": triton}
    point = timing.bandwidth(6, "uniform", 1e9, NoClock(), mixed, mean=20, dim=32)
    assert point["kernels"]["stock"] == "failed: RuntimeError: first line"
    assert isinstance(point["kernels"]["our Triton"], dict)


def test_the_sweep_stops_when_time_is_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda _: 1e9)
    monkeypatch.setattr(timing, "bandwidth", partial(timing.bandwidth, mean=20, dim=32))
    left = iter([True, True, True, False])
    only: dict[str, Maker | str] = {"our Triton": triton}
    made = timing.sweep(NoClock(), only, lambda: next(left), sizes=(4, 6))
    assert made["copy_bytes_per_s"] == 1e9
    assert [(p["rows"], p["lengths"]) for p in made["bandwidth"]] == [
        (4, "uniform"), (4, "lognormal"), (4, "heavy")
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("our Triton") == 3 and "not run: out of time" in said


def test_planner_and_copy() -> None:
    made = timing.planner(NoClock(), layers=3, bs=2, heads=2, dim=32, **MODEL)
    assert made["plan_us"] == made["grow_us"] == 2000
    assert made["plan_host_us_uncaptured"] == 5


def test_every_operation_of_a_step_can_follow_the_one_before() -> None:
    for _ in range(2):
        for name, work in gpu_steps.operations("cpu", 32, **MODEL).items():
            work()
            assert name

# SPDX-License-Identifier: Apache-2.0
"""The timed part of gpu_check on CPU tensors; run by test_gpu_check.py with TRITON_INTERPRET=1.

Figures mean nothing here: the clock calls the work and answers a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fairkv_sglang.bench.clocks import captured
from fairkv_sglang.bench.gpu import checks, points, steps, timing
from fairkv_sglang.bench.gpu.contenders import CONTENDERS, Maker, Ours, OurTriton
from fairkv_sglang.kernels.flashinfer_model import FlashInferModel
from fairkv_tests import fake_flashinfer

MODEL: dict[str, Any] = {"module": FlashInferModel(), "spare": 9}


class NoClock:
    device = "cpu"

    def __init__(self) -> None:
        self.calls = 0

    def ms(self, work: Callable[[], object], capture: bool = True) -> float:
        self.calls += 1
        captured(work, self.device)()
        return 2.0

    def host_us(self, work: Callable[[], object]) -> float:
        self.calls += 1
        work()
        return 5.0


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flashinfer.install(monkeypatch)
    monkeypatch.setattr(points, "POINT_BYTES", 1)  # two layers
    monkeypatch.setattr(timing, "DIM", 32)
    monkeypatch.setattr(timing, "ROW_BYTES", 128)


def makers() -> dict[str, Maker | str]:
    made: dict[str, Maker | str] = dict(CONTENDERS)
    made["ours"] = partial(Ours, **MODEL)
    made["unordered"] = partial(Ours, longest_first=False, **MODEL)
    made["S=1/SM"] = made["S=4/SM"] = "not run: no multiprocessors"
    return made


def test_our_contenders_equal_torch() -> None:
    ours = partial(Ours, **MODEL)
    checks.contender_equals_torch(ours, "cpu", torch.bfloat16, 1e-2, 32)
    # The interpreter's dot product takes bfloat16 for integers.
    checks.contender_equals_torch(OurTriton, "cpu", torch.float32, 1e-5, 32)


def test_a_point_has_figures_of_every_kernel() -> None:
    clock = NoClock()
    point = timing.bandwidth(6, "heavy", 1e9, clock, makers(), mean=20)
    figures = {name: x for name, x in point["kernels"].items() if not isinstance(x, str)}
    assert set(point["kernels"]) - set(figures) == {"S=1/SM", "S=4/SM"}
    size = 2 * 6 * 20 * 128
    for name, x in figures.items():
        assert x["us_per_layer"] == pytest.approx(1000)
        assert x["of_copy"] == pytest.approx(size / 2e-3 / 1e9)
        planned = {key.split("_")[0] for key in x if "plan" in key}
        on_host = name in ("stock", "BatchAttention")
        assert planned == ({"host"} if on_host else set() if name == "our Triton" else {"device"})
    assert "failed" not in points.bandwidth_table([point])


def test_a_kernel_that_breaks_does_not_stop_the_others() -> None:
    def breaks(*_: object) -> Any:
        raise RuntimeError("first line\nsecond line")

    mixed: dict[str, Maker | str] = {"stock": breaks, "our Triton": OurTriton}
    point = timing.bandwidth(6, "uniform", 1e9, NoClock(), mixed, mean=20)
    assert point["kernels"]["stock"] == "failed: RuntimeError: first line"
    assert isinstance(point["kernels"]["our Triton"], dict)


def test_the_sweep_stops_when_time_is_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda _: 1e9)
    monkeypatch.setattr(timing, "SIZES", (4, 6))
    monkeypatch.setattr(timing, "bandwidth", partial(timing.bandwidth, mean=20))
    left = iter([True, True, True, False])
    only: dict[str, Maker | str] = {"our Triton": OurTriton}
    peak, made = timing.sweep(NoClock(), only, lambda: next(left))
    assert peak == 1e9
    assert [(p["rows"], p["lengths"]) for p in made] == [
        (4, "uniform"), (4, "lognormal"), (4, "heavy")
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("our Triton") == 3 and "not run: out of time" in said


def test_planner_and_copy() -> None:
    made = timing.planner(NoClock(), layers=3, bs=2, heads=2, **MODEL)
    assert made["rows_per_layer"] == 4
    assert made["plan_us"] == made["grow_us"] == 2000
    assert made["plan_host_us_uncaptured"] == 5


def test_every_operation_of_a_step_can_follow_the_one_before() -> None:
    for _ in range(2):
        for name, work in steps.operations("cpu", 32, **MODEL).items():
            work()
            assert name

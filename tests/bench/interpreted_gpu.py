# SPDX-License-Identifier: Apache-2.0
"""Checks and timings of gpu_check on CPU tensors; run by test_gpu_check.py with TRITON_INTERPRET=1.

Triton's kernels are interpreted and a model stands for FlashInfer's. Figures mean nothing here: the
clock calls the work and answers a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fairkv_sglang.attention.compress_all import AllPromptsCompressor
from fairkv_sglang.bench.clocks import captured
from fairkv_sglang.bench.gpu import step, timing
from fairkv_sglang.bench.gpu.contenders import CONTENDERS, Maker, ours, triton
from fairkv_sglang.bench.virtual.rank import Device, decoder
from fairkv_sglang.kernels import HeadPages
from fairkv_sglang.kernels.cuda import flashinfer
from fairkv_sglang.kernels.cuda import operations as triton_ops
from fairkv_sglang.kernels.cuda.flashinfer import FlashInferDecoder
from fairkv_sglang.kernels.cuda.score import snapkv_score
from fairkv_tests import (
    fake_flashinfer,
    gpu_checks,
    gpu_hand_over,
    gpu_prompts,
    gpu_steps,
    reference,
)
from fairkv_tests.flashinfer_model import FlashInferModel
from fairkv_tests.launches import launches

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


@pytest.fixture
def device_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head pages as on a GPU."""
    create = HeadPages.create

    def made(*args: Any, **options: Any) -> HeadPages:
        pages = create(*args[:7], **{**options, "by_columns": False})
        pages.kernels = triton_ops
        return pages

    monkeypatch.setattr(HeadPages, "create", made)


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
    assert "failed" not in timing.point_line(point)


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
    points = [
        (4, "uniform", 20, 1),
        (4, "heavy", 20, 1),
        (6, "uniform", 30, 5),
        (6, "heavy", 20, 1),
    ]
    monkeypatch.setattr(timing, "problems", lambda: points)
    monkeypatch.setattr(timing, "bandwidth", partial(timing.bandwidth, dim=32))
    left = iter([True, True, True, False])
    only: dict[str, Maker | str] = {"our Triton": triton}
    made = timing.sweep(NoClock(), only, lambda: next(left))
    assert made["copy_bytes_per_s"] == 1e9
    found = [(p["rows"], p["lengths"], p["mean"], p["group"]) for p in made["bandwidth"]]
    assert found == points[:3]
    assert [p["kernels"]["our Triton"]["over_uniform"] for p in made["bandwidth"]] == [1, 1, 1]
    said = capsys.readouterr().out
    assert said.count("our Triton") == 3 and "not run: out of time" in said


@pytest.mark.usefixtures("device_pages")
def test_a_whole_step_at_several_batch_sizes() -> None:
    made = step.whole_step(NoClock(), 3, 2, 4, batches=(1, 3), mean=20, dim=32, **MODEL)
    assert set(made) == {1, 3}
    for figures in made.values():
        assert figures["step_us"] == figures["empty_us"] == figures["grow_us"] == 2000
    assert made[3]["gb_per_s"] > 2 * made[1]["gb_per_s"]


@pytest.mark.usefixtures("device_pages")
def test_a_step_starts_anew_for_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a step is launched; what an error bit says ends the measurement."""
    whole = step.Step("cpu", 3, 2, 4, 2, mean=20, dim=32, **MODEL)
    rows, lens = torch.arange(1, 3), whole.pages.lens.clone()
    with launches() as made:
        whole.run(rows)
    assert made.waits == []
    assert made.kernels[:6] == [
        "_count_new_pages", "_grow", "_pop", "_lay_out", "_list_tiles", "_list_pages"
    ]  # fmt: skip
    assert made.kernels[6:] == ["_append"] * 3  # attention is a model's here
    assert torch.equal(whole.pages.lens[1:], lens[1:] + 1)
    whole.restore()
    assert torch.equal(whole.pages.lens, lens)
    whole.pages.check_integrity()
    whole.restore(1)
    for _ in range(17):
        whole.run(rows)
    whole.restore()
    whole.pages.error.fill_(1)
    with pytest.raises(RuntimeError, match="no free head page"):
        whole.restore()


@pytest.mark.usefixtures("device_pages")
def test_hand_over_and_compression_by_the_devices_compressor() -> None:
    """On a device all prompts of a pass are compressed at once."""
    made = gpu_hand_over.Pass(0, (4, 4), "cpu", 16, "layer", gpu_hand_over.FirstNumber())
    assert all(type(rank.compressor) is AllPromptsCompressor for rank in made.ranks)
    made.admit()
    made.run()
    assert made.check() > 0  # rows that left a rank
    assert gpu_prompts.compressed(NoClock(), 80, layers=1, dim=16)["us"] == 2000
    assert set(gpu_prompts.one_layer(NoClock(), tokens=200, kept=50, dim=16)) == {
        "known", "bounded"
    }  # fmt: skip


@pytest.mark.usefixtures("device_pages")
def test_an_arena_is_used_to_its_last_page() -> None:
    text = gpu_steps.large_arena("cpu", 32, elements=2**15, **MODEL)
    assert text == "320 pages"
    assert step.borders(NoClock(), 3, lanes=5, calls=2) == {"at once": 125, "spread": 125}


def test_every_operation_of_a_step_can_follow_the_one_before() -> None:
    for _ in range(2):
        for name, work in gpu_steps.operations("cpu", 32, **MODEL).items():
            work()
            assert name


@pytest.mark.usefixtures("device_pages")
@pytest.mark.parametrize(("group", "dim"), [(1, 128), (8, 32)])
def test_virtual_ranks_decode_with_the_models_sizes(
    monkeypatch: pytest.MonkeyPatch, group: int, dim: int
) -> None:
    """`fairkv bench --virtual` on CUDA: any head size and group, several sets of pages in turn."""
    monkeypatch.setattr(flashinfer, "FlashInferDecoder", partial(FlashInferDecoder, **MODEL))
    device = Device("cpu", torch.bfloat16)
    device.decode = "flashinfer"
    pages = device.pages(np.tile(np.array([[20, 0], [3, 150]]), 2), dim)
    q, rows = device.random(2, 2 * group, dim), torch.tensor([1, 2])
    out, want = torch.empty_like(q), torch.empty_like(q)
    run = decoder(device, pages, rows, q, out, group, sets=2)
    for turn in range(3):
        run(turn)
        reference.decode(pages, q, rows, 2 * (turn % 2), 2, dim**-0.5, want)
        assert gpu_checks.difference(out, want) < 1e-2

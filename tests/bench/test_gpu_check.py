# SPDX-License-Identifier: Apache-2.0
"""`bench/gpu_check.py` without a GPU: what it runs, what it says it left out, when it fails."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fairkv_sglang.attention.hand_over import HandOver
from fairkv_sglang.bench.gpu import checks, hand_over, points
from fairkv_sglang.bench.gpu.contenders import CONTENDERS
from fairkv_sglang.bench.gpu.report import Report
from fairkv_sglang.kernels import HeadPages, numba_cpu, plan, reference, workload
from fairkv_tests import fake_flashinfer

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.py"
ON_CPU = (
    "golden plan, CPU",
    "plans against FlashInfer's rules, CPU",
    "ragged and uniform batches",
    "page operations, numba against torch",
    "full arena, numba",
    "hand-over of kept rows, CPU",
    "decode in float32, numba against torch",
    "decode in bfloat16, numba against torch",
    "page operations, Triton interpreted, against torch",
    "full arena, Triton interpreted",
    "decode, Triton interpreted, against torch",
    "SnapKV score, Triton interpreted, against torch",
    "page lists, Triton interpreted, against the tables",
    "planned decode, model of FlashInfer, against torch",
    "planned step over changing batches, model",
    "tile order and spare tiles, model",
    "SGLang's Triton decode, folded, interpreted",
)
ON_GPU = (
    "golden plan, CUDA",
    "plans and page lists against FlashInfer's rules, CUDA",
    "page operations (append, grow, store_kept, release)",
    "full arena, Triton",
    "SnapKV score, Triton",
    "our Triton decode",
    "plan equals FlashInfer's own planner",
    "FlashInfer decode, folded, planned on the device",
    "tile order and spare tiles",
    "no host synchronisation",
    "hand-over of kept rows",
    "no host synchronisation, hand-over",
    "NCCL all-to-all, one rank",
    "CUDA graph replayed over changing batches",
    "stock FlashInfer decode",
    "FlashInfer BatchAttention",
    "SGLang's Triton decode, folded",
    "planner, 80 layers of 512 rows",
    "hand-over of a layer, 8,192 tokens, 2,048 kept",
    "decode bandwidth",
    "FlashInfer decode, head dimension 64",
    "more tests of the Triton kernels",
)


@pytest.fixture
def script() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_on_cpu_it_runs_what_it_can_and_names_what_it_left_out(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--cpu", "--json", str(file)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    lines = result.stdout.splitlines()
    for name in ON_CPU:
        assert any(line.startswith(name) and "passed" in line for line in lines), name
    for name in ON_GPU:
        assert any(line.startswith(name) and line.endswith("not run: no GPU") for line in lines)
    assert f"{len(ON_CPU)} passed, 0 failed, {len(ON_GPU)} not run" in result.stdout
    assert "CUDA is untested" in lines[-1]
    for rows in (64, 256, 1024, 4096):
        for kind in workload.KINDS:
            cells = next(line.split() for line in lines if line.split()[:2] == [str(rows), kind])
            assert cells[6:] == ["not", "run"] * len(CONTENDERS)
    written = json.loads(file.read_text())
    assert [row["name"] for row in written["checks"]] == [*ON_CPU, *ON_GPU]
    assert {row["status"] for row in written["checks"]} == {"passed", "not run"}
    assert len(written["bandwidth"]) == len(points.SIZES) * len(workload.KINDS)


def slightly_wrong(
    pages: HeadPages,
    q: torch.Tensor,
    rows: torch.Tensor,
    lane_lo: int,
    n: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    reference.decode(pages, q, rows, lane_lo, n, scale * 1.02, out)


def test_a_broken_kernel_makes_it_fail(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(numba_cpu, "decode", slightly_wrong)
    row = {"name": "interpreted", "status": "passed", "seconds": 0.1, "detail": ""}
    monkeypatch.setattr(script, "interpreted_rows", lambda: [row])
    assert script.main(["--cpu"]) == 1
    said = capsys.readouterr().out
    assert "FAILED: RuntimeError: group 1: differs from torch by" in said
    assert " 2 failed," in said


@pytest.mark.parametrize("trouble", ["a failed check", "a dead process"])
def test_trouble_in_the_interpreter_makes_it_fail(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trouble: str,
) -> None:
    if trouble == "a failed check":
        row = {"name": "a", "status": "FAILED", "seconds": 0.1, "detail": "b"}
        monkeypatch.setattr(script, "interpreted_rows", lambda: [row])
    else:
        dead = SimpleNamespace(stdout="warning\n", stderr="Segmentation fault", returncode=-11)
        monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: dead)
    monkeypatch.setattr(script, "check_on_cpu", lambda _: None)
    assert script.main(["--cpu"]) == 1
    assert " 1 failed," in capsys.readouterr().out


def broken(name: str) -> Any:
    """The CPU kernels with one operation that is wrong."""

    def grow(pages: HeadPages, rows: torch.Tensor, slots: torch.Tensor) -> None:
        numba_cpu.grow(pages, rows, slots)
        slots[slots >= 0] ^= 1

    def append(pages: HeadPages, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        numba_cpu.append(pages, slots, v, k)

    def store_kept(pages: HeadPages, *arguments: Any) -> None:
        row, lane_lo, k, v, slots, kept, counts, columns = arguments
        fewer = (counts - 1).clamp(min=0)
        numba_cpu.store_kept(pages, row, lane_lo, k, v, slots, kept, fewer, columns)

    def store_columns(pages: HeadPages, *arguments: Any) -> None:
        columns = arguments[-1]
        numba_cpu.store_kept(
            pages, *arguments[:-1], None if columns is None else columns.clamp(min=0)
        )

    def release(pages: HeadPages, rows: torch.Tensor) -> None:
        numba_cpu.release(pages, rows[:0])

    operations = {n: getattr(numba_cpu, n) for n in ("set_owned", "grow", "append", "store_kept")}
    operations["release"] = numba_cpu.release
    wrong = {"grow": grow, "append": append, "store_kept": store_kept, "release": release}
    wrong["columns"] = store_columns
    replaced = "store_kept" if name == "columns" else name
    return SimpleNamespace(**{**operations, replaced: wrong[name]})


@pytest.mark.parametrize("name", ["grow", "append", "store_kept", "columns", "release"])
def test_page_operations_that_are_wrong_are_noticed(name: str) -> None:
    with pytest.raises(RuntimeError):
        checks.page_operations(broken(name), "cpu", torch.float32, by_columns=True, rounds=1)


def test_an_overflow_that_nobody_reports_is_noticed() -> None:
    def silent(*arguments: Any) -> None:
        try:
            numba_cpu.grow(*arguments)
        except RuntimeError:
            return

    kernels = SimpleNamespace(set_owned=numba_cpu.set_owned, grow=silent)
    with pytest.raises(RuntimeError, match="error bits 0, expected 1"):
        checks.full_arena(kernels, "cpu", by_columns=True)


def test_wrong_attention_scores_and_page_lists_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RuntimeError, match="group 5: differs"):
        checks.decode_equals_torch(
            slightly_wrong, "cpu", torch.float32, 1e-5, 16, checks.SHORT, groups=(5,)
        )
    with pytest.raises(RuntimeError, match="differs from torch"):
        checks.snapkv_equals_torch(
            lambda q, k, scale, *rest: reference.snapkv_score(q, k, scale * 1.1, *rest), "cpu"
        )
    with pytest.raises(RuntimeError, match="page lists differ"):
        checks.random_plans("cpu", lambda *arguments: arguments[-1].fill_(-1), rounds=1)
    make = workload.lengths
    monkeypatch.setattr(workload, "lengths", lambda kind, rows, mean: make(kind, rows, mean) + 1)
    with pytest.raises(RuntimeError, match="tokens"):
        checks.workloads((64,), 100)


@pytest.mark.parametrize("trouble", ["wrong rows", "a dead rank", "sizes that do not fit"])
def test_a_wrong_hand_over_is_noticed(monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    pack, sizes = HandOver._pack, HandOver._sizes

    def wrong(self: HandOver, k_pool: torch.Tensor, *rest: Any) -> None:
        pack(self, k_pool + 1, *rest)

    def dead(self: HandOver, *rest: Any) -> None:
        if self.heads.rank:
            raise RuntimeError("a dead rank")
        pack(self, *rest)

    def larger(self: HandOver, *rest: Any) -> Any:
        return sizes(self, *rest) * (1 + self.heads.rank)

    change: dict[str, Any] = {
        "wrong rows": ("_pack", wrong, "other rows than kept"),
        "a dead rank": ("_pack", dead, "a dead rank"),
        "sizes that do not fit": ("_sizes", larger, "ranks disagree about sizes"),
    }
    name, function, said = change[trouble]
    monkeypatch.setattr(HandOver, name, function)
    with pytest.raises(RuntimeError, match=said):
        hand_over.owners_hold_what_is_kept("cpu", 16, rounds=1)


def test_what_waits_for_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hand_over.no_host_synchronisation("cpu", 16) == "9 passes"
    waiting, finish = list[int](), HandOver.finish

    def waits(self: HandOver) -> None:
        waiting.append(1)
        if len(waiting) > 130:  # past the warm-up
            raise RuntimeError("called a synchronizing CUDA operation")
        finish(self)

    monkeypatch.setattr(HandOver, "finish", waits)
    with pytest.raises(
        RuntimeError, match=r"^test_gpu_check.py:\d+: raise .*: called a synchroniz"
    ):
        hand_over.no_host_synchronisation("cpu", 16)


def test_the_hand_over_is_timed_and_a_group_of_one_is_tried() -> None:
    def host_us(work: Callable[[], object]) -> float:
        work()
        return 5.0

    clock: Any = SimpleNamespace(
        device="cpu", host_us=host_us, ms=lambda work, capture: host_us(work) * 0.4
    )
    made = hand_over.one_layer(clock, tokens=400, kept=100, dim=16)
    assert set(made) == {"known", "bounded"}
    assert made["known"]["sent_per_kept"] == 1 < made["bounded"]["sent_per_kept"]
    row_bytes = 2 * 16 * 2
    assert made["known"]["gb_per_s"] == pytest.approx(2 * 400 * row_bytes / 2e-3 / 1e9)
    assert hand_over.group_of_one("cpu") == "gloo"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("chunk", lambda x: x + 128),
        ("o_indptr", lambda x: x + 1),
        ("kv_tile", lambda x: x + 1),
        ("request", lambda x: x.flip(1)),
        ("valid", lambda x: ~x),
        ("last_page_len", lambda x: x % 16),
    ],
)
def test_a_wrong_plan_is_noticed(
    monkeypatch: pytest.MonkeyPatch, field: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    make = plan.plan_tiles

    def wrong(*arguments: Any, **options: Any) -> plan.Tiles:
        tiles = make(*arguments, **options)
        return plan.Tiles(**{**vars(tiles), field: change(getattr(tiles, field))})

    monkeypatch.setattr(plan, "plan_tiles", wrong)
    with pytest.raises(RuntimeError):
        checks.random_plans("cpu")


@pytest.mark.parametrize("name", ["stock", "BatchAttention"])
def test_flashinfer_wrappers_get_the_folded_problem(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_flashinfer.install(monkeypatch)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        checks.contender_equals_torch(CONTENDERS[name], "cpu", dtype, tolerance, 32)


def test_what_is_not_installed_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(gpu=True, budget=60)
    report.check(
        "stock",
        lambda: checks.contender_equals_torch(CONTENDERS["stock"], "cpu", torch.float32, 1e-6, 16),
        gpu=True,
    )
    report.check("long", lambda: None, seconds=100)
    assert [row["detail"] for row in report.rows] == ["FlashInfer is not installed", "out of time"]
    assert report.count("FAILED") == 0
    assert capsys.readouterr().out.count("not run: ") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_checks_for_a_gpu_get_as_far_as_the_missing_gpu(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No GPU has run these lines; at least nothing but CUDA and FlashInfer stops them."""
    monkeypatch.setattr(script, "more_tests", lambda: None)
    report = Report(gpu=True, budget=1000)
    script.check_on_gpu(report)
    figures = script.measure(report)
    script.check_last(report)
    script.show(figures)
    assert [row["name"] for row in report.rows] == list(ON_GPU)
    for row in report.rows[:-1]:
        missing = ("CUDA enabled", "NVIDIA", "FlashInfer is not installed", "0 active drivers")
        assert any(text in row["detail"] for text in missing), row
    assert "all kernels: not run: the benchmark failed" in capsys.readouterr().out


def test_kernels_that_failed_their_check_are_not_timed(script: Any) -> None:
    report = Report(gpu=True, budget=60)
    for name in script.CHECKED_BY.values():
        status = "FAILED" if "BatchAttention" in name else "passed"
        status, detail = ("not run", "SGLang is gone") if "SGLang" in name else (status, "")
        report.add(name, status, 0.0, detail)
    made = script.makers(report)
    assert made.pop("BatchAttention") == "not run: its check failed"
    assert made.pop("SGLang Triton") == "not run: SGLang is gone"
    assert made == {name: CONTENDERS[name] for name in made}


def test_tables_show_bandwidth_cost_of_uneven_lengths_and_reasons() -> None:
    def point(kind: str, us: float) -> dict[str, Any]:
        ours = {"us_per_layer": us, "of_copy": 80 / us, "device_plan_us_per_layer": 3.0}
        stock = {"us_per_layer": 2 * us, "of_copy": 40 / us, "host_plan_us_per_layer": 250.0}
        kernels = {"ours": ours, "stock": stock, "BatchAttention": "failed: RuntimeError: no"}
        return points.problem(64, kind)[1] | {"kernels": kernels}

    made = [point("uniform", 100.0), point("heavy", 110.0)]
    points.over_uniform(made)
    text = points.bandwidth_table(made)
    assert "0.80 / 1.00" in text and "0.73 / 1.10" in text and "0.36 / 1.10" in text
    assert "BatchAttention: failed: RuntimeError: no" in text
    assert "ours, lowest fraction of copy bandwidth: 0.73 (B' 64, heavy)" in text
    assert "ours, longest time over uniform lengths: 1.10 (B' 64, heavy)" in text
    assert points.point_line(made[1]).startswith("B'    64 heavy     ours 0.73 / 1.10, stock")
    planning = points.planning_table(made)
    assert "device 3" in planning and "host 250" in planning and "failed" in planning


def test_all_kinds_of_a_size_hold_equal_bytes() -> None:
    for rows in points.SIZES:
        made = {kind: points.problem(rows, kind) for kind in workload.KINDS}
        sums = {tuple(lens.sum(0).tolist()) for lens, _ in made.values()}
        assert sums == {(rows * points.MEAN,) * points.layers_of(rows)}
        for _, point in made.values():
            assert point["tiles"] <= point["tiles_at_most"]
            assert point["page_overhead"] < 1.01


def test_the_timed_part_runs_on_models(tmp_path: Path) -> None:
    """Benchmark and planner with a clock that does not measure, Triton interpreted."""
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
            str(Path(__file__).with_name("interpreted_timing.py")),
        ],
        cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout

# SPDX-License-Identifier: Apache-2.0
"""`bench/gpu_check.py` without a GPU: its parts and tables, and what it says of what ran."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fairkv_sglang.bench import gpu_check, resident
from fairkv_sglang.bench.gpu import timing
from fairkv_sglang.bench.gpu.contenders import CONTENDERS
from fairkv_sglang.bench.gpu.libcuda import link_driver
from fairkv_sglang.bench.gpu.report import Part, Report
from fairkv_tests import gpu_checks

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_without_a_gpu_it_says_that_nothing_ran(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 0
    assert gpu_check.main(["--gpu-only"]) == 1
    assert capsys.readouterr().out.count("no GPU: nothing was run") == 2


def test_what_is_not_installed_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(budget=60)
    report.check(
        "stock",
        lambda: gpu_checks.contender_equals_torch(
            CONTENDERS["stock"], "cpu", torch.float32, 1e-6, 16
        ),
    )
    late = Report(budget=-1)
    late.check("late", lambda: None)
    Part("part", 10, lambda report: None).run(late)
    rows = [*report.rows, *late.rows]
    assert [row["detail"] for row in rows] == [
        "FlashInfer is not installed", "out of time", "out of time"
    ]  # fmt: skip
    assert report.summary().startswith("0 passed, 0 failed, 1 not run")
    assert capsys.readouterr().out.count("not run: ") == 3


def test_a_part_that_hangs_or_dies_costs_no_other() -> None:
    """Each part is a process of its own; what it found before is kept."""
    report = Report(budget=60)

    def hangs(report: Report) -> None:
        report.check("before", lambda: "fine")
        report.check("hangs", lambda: time.sleep(100))

    def dies(report: Report) -> None:
        report.check("dies", lambda: os._exit(3))

    def works(report: Report) -> dict[str, Any]:
        assert 44 < report.left < 45  # of its own 50 seconds
        seen = [row["status"] for row in report.rows]
        report.check("works", lambda: seen)
        return {"figure": 7}

    parts = (Part("first", 1, hangs), Part("second", 50, dies), Part("third", 50, works))
    found = [part.run(report) for part in parts]
    assert found == [{}, {}, {"figure": 7}]
    assert [(row["name"], row["status"]) for row in report.rows] == [
        ("before", "passed"), ("hangs", "FAILED"), ("dies", "FAILED"), ("works", "passed")
    ]  # fmt: skip
    _, hung, dead, last = (row["detail"] for row in report.rows)
    assert hung == "killed, as the part 'first' took 1 s"
    assert dead == "the process ended with status 3"
    assert last == "['passed', 'FAILED', 'FAILED']"
    assert report.left > 50


def test_all_parts_fit_one_call() -> None:
    """FlashInfer's kernels are compiled first and at once, and no part can take all of the time."""
    assert gpu_check.PARTS[0].work is gpu_check.compile_kernels
    assert max(part.seconds for part in gpu_check.PARTS) <= 200
    assert set(gpu_check.step.BATCHES) >= {12, 72, 256}
    assert {shape[0] for shape in gpu_check.step.SHAPES.values()} == {32, 80}
    assert gpu_check.PROMPTS == (512, 8192, 131072)
    means, groups = ({p[i] for p in timing.problems()} for i in (2, 3))
    assert (min(means), max(means), min(groups), max(groups)) == (128, 2048, 1, 16)


def test_it_needs_no_sglang() -> None:
    """Nor what comes with it; the tests' helpers are found by the script itself."""
    code = (
        "import sys\n"
        "for name in ('sglang', 'prometheus_client', 'rich', 'transformers', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from fairkv_sglang.bench import gpu_check\n"
        "gpu_check.hand_over(), gpu_check.prompts()\n"
        "from fairkv_tests import gpu_steps\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_linker_finds_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another library in the driver's place."""
    monkeypatch.setenv("LIBRARY_PATH", "/elsewhere")
    assert link_driver(tmp_path, "libnone.so.1") == ""
    found = link_driver(tmp_path, "libm.so.6")
    assert (tmp_path / "libm.so").resolve() == Path(found).resolve()
    assert os.environ["LIBRARY_PATH"] == f"{tmp_path}:/elsewhere"


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_checks_for_a_gpu_get_as_far_as_the_missing_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """No GPU has run these lines; at least nothing but CUDA and FlashInfer stops them."""
    report = Report(budget=1000)
    for part in gpu_check.PARTS:
        part.work(report)
    assert len(report.rows) == 27 and report.count("passed") == 0
    for row in report.rows:
        missing = ("CUDA enabled", "NVIDIA", "FlashInfer is not installed", "0 active drivers")
        assert any(text in row["detail"] for text in missing), row


def test_kernels_that_failed_their_check_are_not_timed() -> None:
    report = Report(budget=60)
    for name, status in (("ours", "passed"), ("stock", "FAILED"), ("our Triton", "not run")):
        row = {"name": gpu_check.CHECKED_BY[name], "status": status, "detail": "Triton is gone"}
        report.rows.append(row)
    assert gpu_check.makers(report) == {
        "ours": CONTENDERS["ours"],
        "stock": "not run: its check failed",
        "our Triton": "not run: Triton is gone",
    }


def test_a_line_shows_bandwidth_cost_of_uneven_lengths_plans_and_reasons() -> None:
    def point(kind: str, us: float) -> dict[str, Any]:
        ours: dict[str, Any] = {
            "us_per_layer": us,
            "of_copy": 80 / us,
            "plan_us_per_layer": 3.0,
            "plans_on": "device",
        }
        stock = {
            "us_per_layer": 2 * us,
            "of_copy": 40 / us,
            "plan_us_per_layer": 250.0,
            "plans_on": "host",
        }
        kernels = {"ours": ours, "stock": stock, "our Triton": "failed: RuntimeError: no"}
        return timing.problem(64, kind)[1] | {"kernels": kernels}

    made = [point("uniform", 100.0), point("heavy", 110.0)]
    timing.over_uniform(made)
    shape = "B'    64 mean 1024 group  4"
    assert timing.point_line(made[1]) == (
        f"{shape} heavy     ours 0.73 / 1.10 (device plan 3 us), "
        "stock 0.36 / 1.10 (host plan 250 us), our Triton failed: RuntimeError: no"
    )
    assert timing.worst(made) == "ours, longest time over uniform lengths: 1.10"
    assert timing.worst([point("uniform", 1.0) | {"kernels": {}}]) == ""


def test_all_kinds_of_a_size_hold_equal_bytes() -> None:
    for rows in timing.SIZES:
        made = [timing.problem(rows, kind) for kind in resident.KINDS]
        sums = {tuple(lens.sum(0).tolist()) for lens, _ in made}
        assert len(sums) == 1 and set(*sums) == {rows * timing.MEAN}
        assert all(point["page_overhead"] < 1.01 for _, point in made)
        assert all(int(lens.min()) >= 1 for lens, _ in made)

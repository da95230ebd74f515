# SPDX-License-Identifier: Apache-2.0
"""Checks and times everything that runs on CUDA, in one call of less than eight minutes.

    python bench/gpu_check.py [--cpu] [--budget SECONDS] [--json FILE]

Without a GPU, or with --cpu, it runs the parts that need none (numba and interpreted Triton kernels
against torch, the plan against FlashInfer's rules, the batches of the benchmark) and says of every
other part that it was not run. Needs torch; FlashInfer, Triton, numba and SGLang if they are to be
checked. Exit status 0 only if everything that ran passed. UNTESTED ON A GPU so far.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# bench/ holds a kernels.py, which other packages must not find as `kernels`.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]
if importlib.util.find_spec("fairkv_sglang") is None:  # a checkout that is not installed
    sys.path.append(str(HERE.parent))

import torch  # noqa: E402

from fairkv_sglang.bench.clocks import CudaClock  # noqa: E402
from fairkv_sglang.bench.gpu import checks  # noqa: E402
from fairkv_sglang.bench.gpu.contenders import CONTENDERS, VARIANTS  # noqa: E402
from fairkv_sglang.bench.gpu.points import (  # noqa: E402
    SIZES,
    bandwidth_table,
    over_uniform,
    planning_table,
    problem,
)
from fairkv_sglang.bench.gpu.report import (  # noqa: E402
    NO_GPU,
    NotRun,
    Report,
    need,
    require,
    versions,
)
from fairkv_sglang.kernels.workload import KINDS  # noqa: E402

DIM, OTHER_DIM = 128, 64
MORE_TESTS = HERE.parent / "tests" / "kernels" / "interpreted_triton.py"
COMPILE_SECONDS = 150
"""What FlashInfer may take to compile a kernel."""
PACKAGES = ("torch", "triton", "flashinfer-python", "sglang", "numba")
OURS = "FlashInfer decode, folded, planned on the device"
CHECKED_BY = {
    **dict.fromkeys(("ours", *VARIANTS), OURS),
    "stock": "stock FlashInfer decode",
    "BatchAttention": "FlashInfer BatchAttention",
    "SGLang Triton": "SGLang's Triton decode, folded",
    "our Triton": "our Triton decode",
}
"""Correctness check of each kernel of the comparison."""
CPU_FLOAT32, CPU_BFLOAT16, CUDA_BFLOAT16 = 3e-6, 1e-2, 2e-2
"""Largest difference from torch; outputs are averages of normal numbers. CUDA kernels round the
attention weights to bfloat16 too."""


# ---- what is checked, imported when its check runs


def load(module: str, package: str, name: str) -> Any:
    """A module of ours that needs a package."""
    require(package, name)
    return importlib.import_module(f"fairkv_sglang.{module}")


def numba_kernels() -> Any:
    return load("kernels.numba_cpu", "numba", "numba")


def triton_kernels() -> Any:
    return load("kernels.triton_ops", "triton", "Triton")


def score() -> Any:
    return load("kernels.triton_score", "triton", "Triton").snapkv_score


def page_lists() -> Any:
    return load("kernels.flashinfer_decode", "triton", "Triton").gather_pages


def planned_steps() -> Any:
    return load("bench.gpu.steps", "flashinfer", "FlashInfer")


def hand_over() -> Any:
    """Checks of the hand-over; they need what a server's configuration needs, but not SGLang."""
    try:
        from fairkv_sglang.bench.gpu import hand_over
    except ModuleNotFoundError as error:
        raise NotRun(f"{error.name} is not installed") from None
    return hand_over


# ---- without a GPU


def hand_over_on_cpu() -> Any:
    numba_kernels()
    return hand_over().owners_hold_what_is_kept("cpu", 16)


def check_on_cpu(report: Report) -> None:
    """The parts that need nothing but a CPU."""
    f32, bf16 = torch.float32, torch.bfloat16
    report.check("golden plan, CPU", lambda: checks.golden_plan("cpu"))
    report.check("plans against FlashInfer's rules, CPU", lambda: checks.random_plans("cpu"))
    report.check("ragged and uniform batches", lambda: checks.workloads(SIZES, 1024))
    report.check(
        "page operations, numba against torch",
        lambda: checks.page_operations(numba_kernels(), "cpu", bf16, by_columns=True),
    )
    report.check("full arena, numba", lambda: checks.full_arena(numba_kernels(), "cpu", True))
    report.check("hand-over of kept rows, CPU", hand_over_on_cpu)
    for name, dtype, tolerance in (
        ("float32", f32, CPU_FLOAT32), ("bfloat16", bf16, CPU_BFLOAT16)
    ):  # fmt: skip
        report.check(
            f"decode in {name}, numba against torch",
            lambda d=dtype, t=tolerance: checks.decode_equals_torch(  # type: ignore[misc]
                numba_kernels().decode, "cpu", d, t, 32, groups=(1, 5, 8)
            ),
        )


def check_interpreted(report: Report) -> None:
    """Triton's kernels on CPU tensors; needs TRITON_INTERPRET=1 before Triton is imported."""
    from fairkv_sglang.bench.gpu import steps
    from fairkv_sglang.kernels import triton_ops
    from fairkv_sglang.kernels.flashinfer_model import FlashInferModel

    f32, model = torch.float32, {"module": FlashInferModel(), "spare": 9}
    small: dict[str, Any] = {"lens": checks.SHORT, "groups": (1, 5), "by_columns": False}
    report.check(
        "page operations, Triton interpreted, against torch",
        lambda: checks.page_operations(triton_ops, "cpu", f32, by_columns=False, rounds=1),
    )
    report.check(
        "full arena, Triton interpreted", lambda: checks.full_arena(triton_ops, "cpu", False)
    )
    report.check(
        "decode, Triton interpreted, against torch",
        lambda: checks.decode_equals_torch(triton_ops.decode, "cpu", f32, CPU_FLOAT32, 24, **small),
    )
    report.check(
        "SnapKV score, Triton interpreted, against torch",
        lambda: checks.snapkv_equals_torch(score(), "cpu"),
    )
    report.check(
        "page lists, Triton interpreted, against the tables",
        lambda: checks.random_plans("cpu", page_lists(), rounds=4),
    )
    report.check(
        "planned decode, model of FlashInfer, against torch",
        lambda: checks.decode_equals_torch(
            steps.planned_decode(**model), "cpu", torch.bfloat16, CPU_BFLOAT16, 32, **small
        ),
    )
    report.check(
        "planned step over changing batches, model",
        lambda: steps.replayed_step("cpu", 32, rounds=1, **model),
    )
    report.check(
        "tile order and spare tiles, model",
        lambda: steps.orders_agree("cpu", 32, module=model["module"]),
    )
    report.check(
        "SGLang's Triton decode, folded, interpreted",
        lambda: checks.contender_equals_torch(
            CONTENDERS["SGLang Triton"], "cpu", f32, CPU_FLOAT32, 32
        ),
    )


def interpreted_rows() -> list[dict[str, Any]]:
    """Rows of `check_interpreted`, run in a process whose Triton interprets its kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, str(HERE / "gpu_check.py"), "--interpreted"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    try:
        return list(json.loads(result.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        raise RuntimeError(f"exit status {result.returncode}\n{result.stderr[-2000:]}") from None


def add_interpreted(report: Report) -> None:
    """Rows of the interpreted kernels, from a process of their own."""
    name = "Triton kernels in the interpreter"
    try:
        require("triton", "Triton")
        if report.gpu:
            raise NotRun("the compiled kernels are checked instead")
        rows = interpreted_rows()
    except NotRun as reason:
        report.add(name, "not run", 0.0, str(reason))
    except RuntimeError as error:
        report.add(name, "FAILED", 0.0, str(error))
    else:
        for row in rows:
            report.add(**row)


# ---- with a GPU


def more_tests() -> None:
    """The Triton test file with compiled kernels, where pytest is installed."""
    if not MORE_TESTS.exists():
        raise NotRun("the tests are not part of this installation")
    require("pytest", "pytest")
    require("pytest_timeout", "pytest-timeout")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(MORE_TESTS)],
        env=environment, cwd=HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    need(result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:])


def check_on_gpu(report: Report) -> None:
    """Correctness on CUDA."""
    bf16 = torch.bfloat16
    on_gpu = partial(report.check, gpu=True)
    on_gpu("golden plan, CUDA", lambda: checks.golden_plan("cuda"))
    on_gpu(
        "plans and page lists against FlashInfer's rules, CUDA",
        lambda: checks.random_plans("cuda", page_lists()),
    )
    on_gpu(
        "page operations (append, grow, store_kept, release)",
        lambda: checks.page_operations(triton_kernels(), "cuda", bf16, by_columns=False),
    )
    on_gpu("full arena, Triton", lambda: checks.full_arena(triton_kernels(), "cuda", False))
    on_gpu("SnapKV score, Triton", lambda: checks.snapkv_equals_torch(score(), "cuda"))
    on_gpu(
        CHECKED_BY["our Triton"],
        lambda: checks.decode_equals_torch(
            triton_kernels().decode, "cuda", bf16, CUDA_BFLOAT16, DIM
        ),
    )
    on_gpu(
        "plan equals FlashInfer's own planner",
        lambda: planned_steps().flashinfer_plan(DIM),
        seconds=COMPILE_SECONDS,
    )
    on_gpu(
        OURS,
        lambda: checks.decode_equals_torch(
            planned_steps().planned_decode(), "cuda", bf16, CUDA_BFLOAT16, DIM
        ),
    )
    on_gpu("tile order and spare tiles", lambda: planned_steps().orders_agree("cuda", DIM))
    on_gpu("no host synchronisation", lambda: planned_steps().no_host_synchronisation(DIM))
    on_gpu("hand-over of kept rows", lambda: hand_over().owners_hold_what_is_kept("cuda", DIM))
    on_gpu(
        "no host synchronisation, hand-over",
        lambda: hand_over().no_host_synchronisation("cuda", DIM),
    )
    on_gpu("NCCL all-to-all, one rank", lambda: hand_over().group_of_one("cuda"))
    on_gpu(
        "CUDA graph replayed over changing batches",
        lambda: planned_steps().replayed_step("cuda", DIM),
    )
    for name in ("stock", "BatchAttention", "SGLang Triton"):
        on_gpu(
            CHECKED_BY[name],
            lambda maker=CONTENDERS[name]: checks.contender_equals_torch(  # type: ignore[misc]
                maker, "cuda", bf16, CUDA_BFLOAT16, DIM
            ),
            seconds=COMPILE_SECONDS if name == "BatchAttention" else 0,
        )


def check_last(report: Report) -> None:
    """What is worth the time that is left."""

    report.check(
        f"FlashInfer decode, head dimension {OTHER_DIM}",
        lambda: checks.decode_equals_torch(
            planned_steps().planned_decode(), "cuda", torch.bfloat16, CUDA_BFLOAT16, OTHER_DIM
        ),
        gpu=True,
        seconds=COMPILE_SECONDS,
    )
    report.check("more tests of the Triton kernels", more_tests, gpu=True, seconds=60)


def makers(report: Report) -> dict[str, Any]:
    """Kernels to time; in place of one that did not pass its check, why it is left out."""
    chosen: dict[str, Any] = {}
    for name, maker in CONTENDERS.items():
        row = next(row for row in report.rows if row["name"] == CHECKED_BY[name])
        reason = row["detail"] if row["status"] == "not run" else "its check failed"
        chosen[name] = maker if row["status"] == "passed" else f"not run: {reason}"
    return chosen


def measure(report: Report) -> dict[str, Any]:
    """Cost of planning and hand-over, decode bandwidth; without a GPU the tables say so in every
    row.
    """
    figures: dict[str, Any] = {}
    chosen = makers(report)

    def planner() -> str:
        timing = load("bench.gpu.timing", "flashinfer", "FlashInfer")
        figures["planner"] = timing.planner(CudaClock())
        return ", ".join(f"{name} {value:.0f}" for name, value in figures["planner"].items())

    def moves() -> str:
        require("triton", "Triton")
        figures["hand_over"] = hand_over().one_layer(CudaClock())
        return "\n".join(
            f"sizes {name}: " + ", ".join(f"{what} {value:.2f}" for what, value in row.items())
            for name, row in figures["hand_over"].items()
        )

    def sweep() -> None:
        timing = load("bench.gpu.timing", "triton", "Triton")
        peak, points = timing.sweep(CudaClock(), chosen, lambda: report.left > 0)
        figures.update(copy_bytes_per_s=peak, bandwidth=points)
        over_uniform(points)
        cells = [x for point in points for x in point["kernels"].values()]
        broken = [x for x in cells if isinstance(x, str) and x.startswith("failed")]
        need(not broken, f"{len(broken)} timings failed, see the table")

    report.check("planner, 80 layers of 512 rows", planner, gpu=True)
    report.check("hand-over of a layer, 8,192 tokens, 2,048 kept", moves, gpu=True)
    report.check("decode bandwidth", sweep, gpu=True)
    if "bandwidth" not in figures:
        row = report.rows[-1]
        reason = row["detail"] if row["status"] == "not run" else "the benchmark failed"
        kernels = dict.fromkeys(CONTENDERS, f"not run: {reason}")
        points = [problem(rows, kind)[1] for rows in SIZES for kind in KINDS]
        figures["bandwidth"] = [point | {"kernels": kernels} for point in points]
    return figures


def show(figures: dict[str, Any]) -> None:
    """Both tables."""
    print("\nDecode of equal bytes: fraction of the device's copy bandwidth / time over uniform")
    print(bandwidth_table(figures["bandwidth"]))
    if "copy_bytes_per_s" in figures:
        print("\nPlanning, microseconds for one layer")
        print(planning_table(figures["bandwidth"]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="only what needs no GPU")
    parser.add_argument(
        "--budget", type=float, default=450, metavar="SECONDS", help="start nothing after these"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and figures there")
    parser.add_argument("--interpreted", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.interpreted:
        report = Report(gpu=False, budget=options.budget)
        check_interpreted(report)
        print(json.dumps(report.rows))
        return 0
    report = Report(torch.cuda.is_available() and not options.cpu, options.budget)
    device = torch.cuda.get_device_name() if report.gpu else "CPU only"
    installed = dict.fromkeys(PACKAGES, "") | versions(*PACKAGES)
    print(", ".join(f"{name} {x or 'not installed'}" for name, x in installed.items()))
    print(f"device: {device}")
    check_on_cpu(report)
    add_interpreted(report)
    check_on_gpu(report)
    figures = measure(report)
    check_last(report)
    show(figures)
    print(f"\n{report.summary()}")
    if not report.gpu:
        print(f'CUDA is untested: whatever is marked "not run: {NO_GPU}" has not run here.')
    if options.json:
        content = {"versions": installed, "device": device, "checks": report.rows, **figures}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if report.count("FAILED") else 0


if __name__ == "__main__":
    sys.exit(main())

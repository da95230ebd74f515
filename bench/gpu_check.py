# SPDX-License-Identifier: Apache-2.0
"""Checks and times everything that runs on CUDA, in one call of less than eight minutes.

    python -m fairkv_sglang.bench.gpu_check [--budget SECONDS] [--json FILE]

Run it in a checkout; it needs torch, Triton, numba, numpy, FlashInfer and pydantic, and names and
leaves out what is missing. Exit status 0 only if everything that ran passed. Without a
GPU nothing runs; the tests run the same functions on the CPU, with Triton's interpreter and a model
of FlashInfer's kernel. UNTESTED ON A GPU so far.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fairkv_sglang.bench.clocks import CudaClock
from fairkv_sglang.bench.gpu import timing
from fairkv_sglang.bench.gpu.contenders import CONTENDERS
from fairkv_sglang.bench.gpu.report import NotRun, Report, require
from fairkv_sglang.bench.stats import versions

# What is compared with a reference is a test, and shared with the tests.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from fairkv_tests import gpu_checks as checks

DIM, OTHER_DIM = 128, 64
COMPILE_SECONDS = 150
"""What FlashInfer may take to compile a kernel."""
PACKAGES = ("torch", "triton", "flashinfer-python", "sglang", "numba")
CHECKED_BY = {
    "ours": "FlashInfer decode, folded, planned on the device",
    "stock": "stock FlashInfer decode",
    "our Triton": "our Triton decode",
}
"""Correctness check of each kernel of the comparison."""
TOLERANCE = 2e-2
"""Largest difference from torch in bfloat16, to which CUDA kernels round attention weights, too;
outputs are averages of normal numbers."""


def load(module: str, package: str = "triton", name: str = "Triton") -> Any:
    """A module of ours that needs a package."""
    require(package, name)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise NotRun(f"{error.name} is not installed") from None


def triton_kernels() -> Any:
    return load("fairkv_sglang.kernels.cuda.operations")


def steps() -> Any:
    return load("fairkv_tests.gpu_steps", "flashinfer", "FlashInfer")


def hand_over() -> Any:
    return load("fairkv_tests.gpu_hand_over")


def check(report: Report) -> None:
    """Correctness on CUDA."""
    run, cuda, bf16 = report.check, "cuda", torch.bfloat16
    triton, compiling = triton_kernels, COMPILE_SECONDS

    def decode(kernel: Any, dim: int = DIM) -> str:
        return checks.decode_equals_torch(kernel, cuda, bf16, TOLERANCE, dim)

    def stock() -> str:
        return checks.contender_equals_torch(CONTENDERS["stock"], cuda, bf16, TOLERANCE, DIM)

    def score() -> Any:
        return load("fairkv_sglang.kernels.cuda.score").snapkv_score

    run("golden plan", lambda: checks.golden_plan(cuda))
    run("plans against FlashInfer's rules, page lists", lambda: checks.random_plans(cuda))
    run("page operations", lambda: checks.page_operations(triton(), cuda, bf16, False))
    run("full arena", lambda: checks.full_arena(triton(), cuda, False))
    run("SnapKV score", lambda: checks.snapkv_equals_torch(score(), cuda))
    run(CHECKED_BY["our Triton"], lambda: decode(triton().decode))
    run("plan equals FlashInfer's own planner", lambda: steps().flashinfer_plan(DIM), compiling)
    run(CHECKED_BY["ours"], lambda: decode(steps().planned_decode()))
    other = f"FlashInfer decode, head dimension {OTHER_DIM}"
    run(other, lambda: decode(steps().planned_decode(), OTHER_DIM), compiling)
    run("tile order and spare tiles", lambda: steps().orders_agree(cuda, DIM))
    run("no host synchronisation", lambda: steps().no_host_synchronisation(DIM))
    run("CUDA graph over changing batches", lambda: steps().replayed_step(cuda, DIM))
    run("hand-over of kept rows", lambda: hand_over().owners_hold_what_is_kept(cuda, DIM))
    text = "no host synchronisation, hand-over"
    run(text, lambda: hand_over().no_host_synchronisation(cuda, DIM))
    run("NCCL all-to-all, one rank", lambda: hand_over().group_of_one(cuda))
    run(CHECKED_BY["stock"], stock)


def makers(report: Report) -> timing.Makers:
    """Kernels to time; in place of one that did not pass its check, why it is left out."""
    chosen: dict[str, Any] = {}
    for name, maker in CONTENDERS.items():
        row = next(row for row in report.rows if row["name"] == CHECKED_BY[name])
        reason = row["detail"] if row["status"] == "not run" else "its check failed"
        chosen[name] = maker if row["status"] == "passed" else f"not run: {reason}"
    return chosen


def measure(report: Report) -> dict[str, Any]:
    """Cost of planning and hand-over, decode bandwidth."""
    figures: dict[str, Any] = {}
    chosen = makers(report)

    def shown(values: dict[str, float]) -> str:
        return ", ".join(f"{name} {value:.2f}" for name, value in values.items())

    def planner() -> str:
        require("flashinfer", "FlashInfer")
        figures["planner"] = timing.planner(CudaClock())
        return shown(figures["planner"])

    def moves() -> str:
        figures["hand_over"] = hand_over().one_layer(CudaClock())
        return "\n".join(f"sizes {name}: {shown(x)}" for name, x in figures["hand_over"].items())

    def sweep() -> str:
        figures.update(timing.sweep(CudaClock(), chosen, lambda: report.left > 0))
        return timing.tables(figures["bandwidth"])

    report.check("planner, 80 layers of 512 rows", planner)
    report.check("hand-over of a layer, 8,192 tokens, 2,048 kept", moves)
    report.check("decode of equal bytes: of copy bandwidth / time over uniform", sweep)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--budget", type=float, default=450, metavar="SECONDS", help="start nothing after these"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and figures there")
    options = parser.parse_args(arguments)
    installed = dict.fromkeys(PACKAGES, "not installed") | versions(*PACKAGES)
    print(", ".join(f"{name} {version}" for name, version in installed.items()))
    if not torch.cuda.is_available():
        print("no GPU: nothing was run, CUDA is untested here")
        return 0
    device = torch.cuda.get_device_name()
    print(f"device: {device}")
    report = Report(options.budget)
    check(report)
    figures = measure(report)
    print(f"\n{report.summary()}")
    if options.json:
        content = {"versions": installed, "device": device, "checks": report.rows, **figures}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if report.count("FAILED") else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Checks and times everything that runs on CUDA, in one call of less than eight minutes.

    python -m fairkv_sglang.bench.gpu_check [--gpu-only] [--budget SECONDS] [--json FILE]

Run it in a checkout. It needs torch, Triton, numba, numpy, SciPy, safetensors, PyYAML, FlashInfer
and pydantic, not SGLang, and names and leaves out what is missing. Every part has a process and a
time of its own; a part that takes longer is killed and the next one starts. Exit status 0 only if
everything that ran passed, with --gpu-only only if everything ran, too. Without a GPU nothing
runs; the tests run the same functions on the CPU, with Triton's interpreter and a model of
FlashInfer's kernel. UNTESTED ON A GPU so far.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fairkv_sglang.bench.clocks import CudaClock
from fairkv_sglang.bench.gpu import step, timing
from fairkv_sglang.bench.gpu.contenders import CONTENDERS
from fairkv_sglang.bench.gpu.libcuda import link_driver
from fairkv_sglang.bench.gpu.report import Figures, NotRun, Part, Report, require
from fairkv_sglang.bench.stats import versions

# What is compared with a reference is a test, and shared with the tests.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from fairkv_tests import gpu_checks as checks

DIMS = (64, 128)
PROMPTS = (512, 8192, 131072)
"""Tokens of the prompts whose compression is timed."""
PACKAGES = ("torch", "triton", "flashinfer-python", "sglang", "numba")
CHECKED_BY = {
    "ours": "FlashInfer decode, D 128, planned on the device",
    "stock": "stock FlashInfer decode",
    "our Triton": "our Triton decode, D 128",
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


def prompts() -> Any:
    return load("fairkv_tests.gpu_prompts")


def device(report: Report) -> Figures:
    """The GPU's name; empty if there is none."""
    return {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else ""}


def compile_kernels(report: Report) -> None:
    """FlashInfer's kernels of all head dimensions at once, each by a compiler of its own."""

    def build() -> str:
        require("flashinfer", "FlashInfer")
        made = load("fairkv_sglang.kernels.cuda.flashinfer", "flashinfer", "FlashInfer").load_module
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda dim: made(torch.bfloat16, dim), DIMS))
        return f"head dimensions {', '.join(map(str, DIMS))}"

    report.check("compilation of FlashInfer's kernels", build)


def kernels(report: Report) -> None:
    """Triton kernels and plans against torch."""
    run, cuda, bf16, triton = report.check, "cuda", torch.bfloat16, triton_kernels

    def decode(dim: int) -> str:
        return checks.decode_equals_torch(triton().decode, cuda, bf16, TOLERANCE, dim)

    def score() -> Any:
        return load("fairkv_sglang.kernels.cuda.score").snapkv_score

    run("golden plan", lambda: checks.golden_plan(cuda))
    run("plans against FlashInfer's rules, page lists", lambda: checks.random_plans(cuda))
    run("page operations", lambda: checks.page_operations(triton(), cuda, bf16, False))
    run("full arena", lambda: checks.full_arena(triton(), cuda, False))
    run("SnapKV score", lambda: checks.snapkv_equals_torch(score(), cuda))
    for dim in DIMS:
        run(f"our Triton decode, D {dim}", lambda dim=dim: decode(dim))  # type: ignore[misc]


def flashinfer(report: Report) -> None:
    """FlashInfer's kernels on our plans, and its own wrapper."""
    run, cuda, bf16 = report.check, "cuda", torch.bfloat16
    for dim in DIMS:

        def plan(dim: int = dim) -> str:
            return str(steps().flashinfer_plan(dim))

        def decode(dim: int = dim) -> str:
            kernel = steps().planned_decode()
            return checks.decode_equals_torch(kernel, cuda, bf16, TOLERANCE, dim)

        run(f"plan equals FlashInfer's own planner, D {dim}", plan)
        run(f"FlashInfer decode, D {dim}, planned on the device", decode)
    dim = DIMS[-1]
    run("tile order and spare tiles", lambda: steps().orders_agree(cuda, dim))
    run("no host synchronisation", lambda: steps().no_host_synchronisation(dim))
    run("CUDA graph over changing batches", lambda: steps().replayed_step(cuda, dim))
    run("arena of more than 2^31 elements", lambda: steps().large_arena(cuda, dim))
    stock = CONTENDERS["stock"]
    run(
        CHECKED_BY["stock"],
        lambda: checks.contender_equals_torch(stock, cuda, bf16, TOLERANCE, dim),
    )


def compression(report: Report) -> Figures:
    """Hand-over and compression of prompts: what is kept, waits, times."""
    run, cuda, dim = report.check, "cuda", DIMS[-1]
    figures: Figures = {"compression": {}}
    run("hand-over of kept rows", lambda: hand_over().owners_hold_what_is_kept(cuda, dim))
    text = "no host synchronisation, hand-over"
    run(text, lambda: hand_over().no_host_synchronisation(cuda, dim))

    def collective() -> str:
        found = figures["hand_over"] = prompts().one_layer(CudaClock())
        return lines(found, "sizes")

    run("hand-over of a layer through NCCL, one rank, 8,192 tokens", collective)
    for tokens in PROMPTS:

        def timed(tokens: int = tokens) -> str:
            found = prompts().compressed(CudaClock(), tokens)
            figures["compression"][tokens] = found
            return shown(found)

        run(f"compression of {tokens:,} tokens, nothing waits", timed)
    return figures


def decode_steps(report: Report) -> Figures:
    """Whole steps and slots across page borders."""
    figures: Figures = {"steps": {}}

    def whole(name: str) -> str:
        require("flashinfer", "FlashInfer")
        found = figures["steps"][name] = step.whole_step(CudaClock(), *step.SHAPES[name])
        return lines(found, "requests")

    def borders() -> str:
        found = {bs: step.borders(CudaClock(), bs) for bs in step.BORDERS}
        figures["borders_us"] = found
        return lines(found, "requests")

    for name in step.SHAPES:
        report.check(name, lambda name=name: whole(name))  # type: ignore[misc]
    report.check("grow across page borders, 640 lanes", borders)
    return figures


def bandwidth(report: Report) -> Figures:
    """Decode bandwidth of equal bytes."""
    figures: Figures = {}

    def sweep() -> str:
        figures.update(timing.sweep(CudaClock(), makers(report), lambda: report.left > 0))
        return timing.worst(figures["bandwidth"])

    report.check("decode of equal bytes: of copy bandwidth / time over uniform", sweep)
    return figures


PARTS = (
    Part("compilation", 200, compile_kernels),
    Part("kernels", 120, kernels),
    Part("FlashInfer", 90, flashinfer),
    Part("compression", 120, compression),
    Part("steps", 120, decode_steps),
    Part("bandwidth", 150, bandwidth),
)
"""With the seconds after which each is killed."""


def makers(report: Report) -> timing.Makers:
    """Kernels to time; in place of one that did not pass its check, why it is left out."""
    chosen: dict[str, Any] = {}
    for name, maker in CONTENDERS.items():
        found = [row for row in report.rows if row["name"] == CHECKED_BY[name]]
        status, detail = (found[0]["status"], found[0]["detail"]) if found else ("not run", "")
        reason = (detail or "not checked") if status == "not run" else "its check failed"
        chosen[name] = maker if status == "passed" else f"not run: {reason}"
    return chosen


def shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def lines(found: dict[Any, dict[str, float]], what: str) -> str:
    return "\n".join(["", *(f"{key} {what}: {shown(x)}" for key, x in found.items())])


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--gpu-only", action="store_true",
        help="status 1 without a GPU, and if anything was left out",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=450, metavar="SECONDS", help="nothing runs after these"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and figures there")
    options = parser.parse_args(arguments)
    installed = dict.fromkeys(PACKAGES, "not installed") | versions(*PACKAGES)
    print(", ".join(f"{name} {version}" for name, version in installed.items()))
    report, figures = Report(options.budget), Figures()
    with tempfile.TemporaryDirectory() as folder:
        driver = link_driver(Path(folder))
        # In a process of its own, too: a fork of one that has touched the device cannot.
        name = Part("device", 60, device).run(report).get("device")
        if not name:
            print("no GPU: nothing was run, CUDA is untested here")
            return 1 if options.gpu_only or report.count("FAILED") else 0
        print(f"device: {name}, driver {driver}")
        for part in PARTS:
            figures |= part.run(report)
    print(f"\n{report.summary()}")
    if options.json:
        content = {"versions": installed, "device": name, "checks": report.rows, **figures}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    left_out = report.count("not run") if options.gpu_only else 0
    return 1 if report.count("FAILED") or left_out else 0


if __name__ == "__main__":
    sys.exit(main())

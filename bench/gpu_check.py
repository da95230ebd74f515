# SPDX-License-Identifier: Apache-2.0
"""Checks and times everything that runs on CUDA, in one call of less than eight minutes.

    python bench/gpu_check.py [--budget SECONDS] [--json FILE]

Without CUDA it runs the parts that need none (plan, Triton's interpreter, numba against the
reference) and says what it skipped. Exit status 0 only if everything that ran passed.
UNTESTED ON A GPU so far.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# bench/ holds a kernels.py, which other packages must not find as `kernels`.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]

import torch  # noqa: E402

from fairkv_sglang.kernels import PAGE_TOKENS, HeadPages, ops, reference  # noqa: E402
from fairkv_sglang.kernels.plan import Fold, csr_pages, csr_starts, plan_tiles  # noqa: E402
from fairkv_sglang.kernels.workload import KINDS, lengths, resident  # noqa: E402

DIM = 128
INTERPRETED = HERE.parent / "tests" / "kernels" / "interpreted_triton.py"
Row = dict[str, Any]


class Skipped(Exception):
    """A check that cannot run here; its text says why."""


def need(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(message)


# ---- without a GPU


def check_golden_plan() -> None:
    plan = plan_tiles(torch.tensor([[0, 40, 129, 1000]]), 4)
    need(plan.o_indptr.tolist() == [[0, 0, 1, 2, 5]], "golden case: o_indptr")
    need(plan.request[0, :5].tolist() == [3, 3, 3, 2, 1], "golden case: rows")
    need(plan.kv_tile[0, :5].tolist() == [0, 1, 2, 0, 0], "golden case: tiles")


def check_random_plans(device: str) -> None:
    """Tiles cover every row once, whatever the lengths; page lists equal the tables."""
    for seed in range(20):
        make = torch.Generator().manual_seed(seed)
        lens = torch.randint(0, 3000, (4, 6), generator=make)
        lens *= torch.rand(4, 6, generator=make) > 0.3
        fold = Fold.create(4, [0, 1, 4, 6], device)
        pages = resident(lens, 16, torch.float32, device)
        pages.owned[1:] = (lens > 0).to(device, torch.uint8)
        rows = torch.tensor([3, 1, 4, 2], device=device)
        table = fold.lens(pages.lens, pages.owned, rows)
        plan = plan_tiles(table, 7)
        for layer in range(3):
            used = plan.valid[layer]
            row, tile = plan.request[layer, used].long(), plan.kv_tile[layer, used]
            left = table[layer, row] - tile * plan.chunk[layer]
            covered = torch.zeros_like(table[layer])
            covered.scatter_add_(0, row, torch.minimum(left, plan.chunk[layer]).to(covered.dtype))
            need(torch.equal(covered, table[layer]), f"plan {seed}: tiles do not cover the rows")
            need(bool((left.clamp(max=int(plan.chunk[layer])).diff() <= 0).all()), "not sorted")
        starts = csr_starts(plan.pages)
        out = torch.zeros(int(plan.pages.sum()) + 1, dtype=torch.int32, device=device)
        csr_pages(pages.page_table, rows, fold, plan.pages, starts, out)
        need(int(starts[-1, -1]) == int(plan.pages.sum()), f"plan {seed}: page list length")


def run_pytest(interpret: bool) -> None:
    if not INTERPRETED.exists():
        raise Skipped("the tests are not part of this installation")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    try:
        import hypothesis  # noqa: F401
        import pytest  # noqa: F401
        import triton  # noqa: F401
    except ImportError as error:
        raise Skipped(f"{error.name} is not installed") from error
    result = subprocess.run(
        [*command, str(INTERPRETED)],
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    need(result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:])


def check_numba() -> None:
    try:
        import numba  # noqa: F401
    except ImportError as error:
        raise Skipped("numba is not installed") from error
    check_decode("cpu", torch.float32, 2e-6, ops.decode, 32)


def check_decode(
    device: str, dtype: torch.dtype, tolerance: float, decode: Callable[..., None], dim: int
) -> None:
    """Folded decode against the reference: every group size, lengths around all borders."""
    lens = torch.tensor([[0, 1, 15, 16], [17, 127, 128, 129], [255, 257, 0, 700], [2000, 3, 0, 31]])
    pages = resident(lens, dim, dtype, device)
    pages.owned[2, 1] = 0
    rows = torch.tensor([3, 0, 1, 4, 2], device=device)
    for group in (1, 2, 4, 5, 7, 8):
        make = torch.Generator(device).manual_seed(group)
        q = torch.randn((5, 4 * group, dim), generator=make, device=device).to(dtype)
        out, want = torch.full_like(q, torch.nan), torch.empty_like(q)
        decode(pages, q, rows, 0, 4, dim**-0.5, out)
        reference.decode(pages, q, rows, 0, 4, dim**-0.5, want)
        worst = float((out.float() - want.float()).abs().max())
        need(worst <= tolerance, f"group {group}: differs from torch by {worst:.3g}")
        need(bool((out[want == 0] == 0).all()), f"group {group}: an empty row is not exactly zero")


# ---- with a GPU


def flashinfer_decode(*arguments: Any) -> None:
    """`ops.decode` through FlashInferDecode, for checks only."""
    from fairkv_sglang.kernels.flashinfer_decode import FlashInferDecode

    pages, q, rows, _, n, scale, out = arguments
    runner = FlashInferDecode(pages, len(rows), [0, n], q.shape[1] // n, scale)
    runner.plan(rows)
    runner.run(0, q, out)


def check_flashinfer_plan() -> str:
    from fairkv_sglang.kernels.flashinfer_check import assert_plan_matches_flashinfer

    start = time.perf_counter()
    for group in (1, 4, 8):
        assert_plan_matches_flashinfer(torch.bfloat16, DIM, group)
    return f"{time.perf_counter() - start:.0f} s with compilation"


def check_orders_agree() -> None:
    """Longest first, FlashInfer's order and more spare tiles at the same chunk: equal bits."""
    from fairkv_sglang.kernels.flashinfer_decode import FlashInferDecode

    lens = lengths("lognormal", 64, 100).view(16, 4)  # short: the chunk is 128 for every `spare`
    pages = resident(lens, DIM, torch.bfloat16, "cuda")
    rows = torch.arange(1, 17, device="cuda")
    q = torch.randn((16, 16, DIM), device="cuda").bfloat16()
    results = []
    for longest_first, spare in ((True, 264), (False, 264), (True, 132), (True, 1000)):
        runner = FlashInferDecode(
            pages, 16, [0, 4], 4, 0.1, spare=spare, longest_first=longest_first
        )
        out = torch.empty_like(q)
        runner.plan(rows)
        runner.run(0, q, out)
        results.append(out)
    need(all(torch.equal(results[0], x) for x in results[1:]), "tile order changes the result")


def check_graph() -> None:
    """A captured step (grow, plan, append, decode of two layers), replayed over many batches."""
    from fairkv_sglang.kernels.flashinfer_decode import FlashInferDecode

    lens = torch.tensor([[15, 16, 300, 5], [200, 0, 31, 64], [1000, 77, 15, 128]])
    bs, group, lane_start = 3, 4, [0, 1, 4]
    pages = resident(lens, DIM, torch.bfloat16, "cuda")
    twin = HeadPages(**{k: v.clone() for k, v in vars(pages).items() if k != "_host"})
    runner = FlashInferDecode(pages, bs, lane_start, group, DIM**-0.5)
    rows = torch.zeros(bs, dtype=torch.int64, device="cuda")
    slots = torch.empty((bs, 4), dtype=torch.int64, device="cuda")
    kv = torch.randn((bs, 8, DIM), device="cuda").bfloat16()
    q = torch.randn((bs, 4 * group, DIM), device="cuda").bfloat16()
    out = torch.empty_like(q)

    def step() -> None:
        ops.grow(pages, rows, slots)
        runner.plan(rows)
        for layer, (a, b) in enumerate(itertools.pairwise(lane_start)):
            ops.append(pages, slots[:, a:b], kv[:, a:b], kv[:, 4 + a : 4 + b])
            part = torch.empty((bs, (b - a) * group, DIM), dtype=q.dtype, device="cuda")
            runner.run(layer, q[:, a * group : b * group], part)
            out[:, a * group : b * group].copy_(part)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # on padding rows alone: compiles, changes nothing
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    want, twin_slots = torch.empty_like(q), torch.empty_like(slots)
    for order in ([1, 2, 3], [3, 0, 1], [0, 0, 2], [2, 3, 1]) * 5:
        rows.copy_(torch.tensor(order))
        kv.normal_()
        q.normal_()
        graph.replay()
        reference.grow(twin, rows, twin_slots)
        need(torch.equal(slots, twin_slots), "graph: slots differ")
        for a, b in itertools.pairwise(lane_start):
            reference.append(twin, twin_slots[:, a:b], kv[:, a:b], kv[:, 4 + a : 4 + b])
            part = torch.empty((bs, (b - a) * group, DIM), dtype=q.dtype, device="cuda")
            queries = q[:, a * group : b * group].contiguous()
            reference.decode(twin, queries, rows, a, b - a, DIM**-0.5, part)
            want[:, a * group : b * group] = part
        worst = float((out.float() - want.float()).abs().max())
        need(worst < 2e-2, f"graph: differs from torch by {worst:.3g}")
    pages.check_integrity()


def gpu_ms(work: Callable[[], object], capture: bool = True, rounds: int = 10) -> float:
    """Median milliseconds of `work` on the device, captured in a graph where that is possible."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    call: Callable[[], object] = work
    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        call = graph.replay
    call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """Bytes/s, read plus written, of a device copy."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / gpu_ms(lambda: b.copy_(a)) * 1e3


def stock_runner(pages: HeadPages, layers: int, group: int, q: Any, out: Any) -> Callable[[], None]:
    """FlashInfer's own plan (once, outside the timing) and run for the same folded problem."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    calls = []
    for layer in range(layers):
        held = (pages.lens[1:, layer] + PAGE_TOKENS - 1) // PAGE_TOKENS
        indptr = torch.zeros(len(held) + 1, dtype=torch.int32)
        indptr[1:] = held.cumsum(0).cpu()
        column = torch.arange(pages.max_pages, device="cuda")
        indices = pages.page_table[1:, layer][column < held[:, None]]
        last = (pages.lens[1:, layer] - 1) % PAGE_TOKENS + 1
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True, backend="fa2"
        )
        wrapper.plan(
            indptr, indices, last.cpu(), group, 1, DIM, PAGE_TOKENS,
            q_data_type=pages.dtype, kv_data_type=pages.dtype,
        )  # fmt: skip
        calls.append(wrapper)
        if layer == 3:
            break  # workspaces are large; four layers are enough to be out of the cache
    cache = (pages.k_pages.unsqueeze(2), pages.v_pages.unsqueeze(2))

    def run() -> None:
        for wrapper in calls:
            wrapper.run(q, cache, out=out)

    run.layers = len(calls)  # type: ignore[attr-defined]
    return run


def bandwidth(rows: int, kind: str, group: int, peak: float) -> Row:
    """One (B', lengths) point: every kernel on the same pages, several layers in one graph."""
    from fairkv_sglang.kernels import triton_ops
    from fairkv_sglang.kernels.flashinfer_decode import FlashInferDecode

    mean = 1024
    row_bytes = 2 * DIM * 2
    layers = max(2, (1 << 29) // (rows * mean * row_bytes))
    lens = torch.stack([lengths(kind, rows, mean, seed) for seed in range(layers)], 1)
    pages = resident(lens, DIM, torch.bfloat16, "cuda")
    q = torch.randn((rows, group, DIM), device="cuda").bfloat16()
    out, batch = torch.empty_like(q), torch.arange(1, rows + 1, device="cuda")
    point: Row = {"rows": rows, "lengths": kind, "group": group, "layers": layers}

    def add(name: str, work: Callable[[], object], many: int) -> None:
        try:
            ms = gpu_ms(work)
        except RuntimeError as error:
            point[name] = f"failed: {str(error).splitlines()[0][:80]}"
            return
        part = float(lens[:, :many].sum()) * row_bytes
        point[name] = {"us_per_layer": ms * 1e3 / many, "of_copy": part / ms * 1e3 / peak}

    lanes = list(range(layers + 1))
    for name, spare, order in (
        ("ours", None, True), ("unordered", None, False), ("S=132", 132, True), ("S=528", 528, True)
    ):  # fmt: skip
        runner = FlashInferDecode(pages, rows, lanes, group, 0.1, spare=spare, longest_first=order)
        runner.plan(batch)
        add(name, lambda r=runner: [r.run(i, q, out) for i in range(layers)], layers)  # type: ignore[misc]
        if name == "ours":
            point["plan_us_all_layers"] = gpu_ms(lambda r=runner: r.plan(batch)) * 1e3  # type: ignore[misc]
    stock = stock_runner(pages, layers, group, q, out)
    add("stock", stock, stock.layers)  # type: ignore[attr-defined]
    add(
        "triton",
        lambda: [triton_ops.decode(pages, q, batch, i, 1, 0.1, out) for i in range(layers)],
        layers,
    )
    return point


def planner(layers: int = 80, bs: int = 64, heads: int = 8) -> Row:
    """Device time of one plan for a large model, and host time of one captured-free call."""
    from fairkv_sglang.kernels.flashinfer_decode import FlashInferDecode

    lanes = layers * heads
    lens = torch.full((bs, lanes), 65)
    pages = resident(lens, 64, torch.bfloat16, "cuda")
    runner = FlashInferDecode(pages, bs, list(range(0, lanes + 1, heads)), 4, 0.1)
    rows = torch.arange(1, bs + 1, device="cuda")
    slots = torch.empty((bs, lanes), dtype=torch.int64, device="cuda")
    result: Row = {"layers": layers, "rows_per_layer": bs * heads}
    result["plan_us"] = gpu_ms(lambda: runner.plan(rows)) * 1e3
    result["grow_us"] = gpu_ms(lambda: ops.grow(pages, rows, slots), rounds=5) * 1e3
    pages.check_integrity()
    start = time.perf_counter()
    for _ in range(20):
        runner.plan(rows)
    result["plan_host_us_uncaptured"] = (time.perf_counter() - start) / 20 * 1e6
    torch.cuda.synchronize()
    return result


def show(point: Row) -> str:
    parts = [f"B' {point['rows']:5} {point['lengths']:10} g {point['group']}"]
    for name in ("ours", "unordered", "S=132", "S=528", "stock", "triton"):
        x = point[name]
        parts.append(
            f"{name} {x['of_copy']:.2f} ({x['us_per_layer']:.0f} us)"
            if isinstance(x, dict) else f"{name} {x}"
        )  # fmt: skip
    return "  ".join([*parts, f"plan {point['plan_us_all_layers']:.0f} us"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--budget", type=float, default=450, metavar="SECONDS")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    begin = time.perf_counter()
    cuda = torch.cuda.is_available()
    report: dict[str, Any] = {"checks": [], "bandwidth": [], "torch": torch.__version__}
    print(f"torch {torch.__version__}; " + (torch.cuda.get_device_name() if cuda else "no CUDA"))

    def check(name: str, work: Callable[[], object], on_gpu: bool = False) -> None:
        start, status, detail = time.perf_counter(), "passed", ""
        try:
            if on_gpu and not cuda:
                raise Skipped("no CUDA device")
            if start - begin > options.budget:
                raise Skipped("out of time")
            detail = work() or ""  # type: ignore[assignment]
        except Skipped as reason:
            status, detail = "skipped", str(reason)
        except Exception as error:  # every failure is a row of the report
            status, detail = "FAILED", f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - start
        report["checks"].append(
            {"name": name, "status": status, "seconds": round(seconds, 2), "detail": str(detail)}
        )
        print(f"{status:8}{seconds:7.1f} s  {name}  {detail}", flush=True)

    bf16 = torch.bfloat16
    check("golden plan", check_golden_plan)
    check("random plans, CPU", lambda: check_random_plans("cpu"))
    check("numba decode against the reference", check_numba)
    check("Triton kernels in the interpreter", lambda: run_pytest(interpret=True))
    check("random plans, CUDA", lambda: check_random_plans("cuda"), on_gpu=True)
    check("Triton kernels on the GPU", lambda: run_pytest(interpret=False), on_gpu=True)
    check(
        "Triton decode against the reference",
        lambda: check_decode("cuda", bf16, 2e-2, ops.decode, DIM), on_gpu=True,
    )  # fmt: skip
    check("plan equals FlashInfer's planner", check_flashinfer_plan, on_gpu=True)
    check(
        "FlashInfer decode against the reference",
        lambda: check_decode("cuda", bf16, 2e-2, flashinfer_decode, DIM), on_gpu=True,
    )  # fmt: skip
    check("tile order and spare tiles", check_orders_agree, on_gpu=True)
    check("CUDA graph with changing batches", check_graph, on_gpu=True)
    check("planner, 80 layers x 512 rows", lambda: report.setdefault("planner", planner()), True)

    def measure() -> str:
        peak = report["copy_bytes_per_s"] = copy_bandwidth()
        print(f"device copy {peak / 1e12:.2f} TB/s; below: fraction of it, time of one layer")
        for rows in (64, 256, 512, 1024, 2048):
            for kind in KINDS:
                if time.perf_counter() - begin > options.budget:
                    return "stopped: out of time"
                point = bandwidth(rows, kind, 4, peak)
                report["bandwidth"].append(point)
                print("  " + show(point), flush=True)
        return ""

    check("bandwidth", measure, on_gpu=True)
    count = {s: sum(c["status"] == s for c in report["checks"]) for s in ("passed", "skipped")}
    failed = len(report["checks"]) - sum(count.values())
    print(
        f"{count['passed']} passed, {failed} failed, {count['skipped']} skipped in "
        f"{time.perf_counter() - begin:.0f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

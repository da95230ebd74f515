# SPDX-License-Identifier: Apache-2.0
"""Checks of the planned decode step: FlashInfer's ABI, graphs, host synchronisation.

`device` is "cuda", or "cpu" with Triton's interpreter and a model in place of FlashInfer's kernel,
where a captured step is simply called again.
"""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fairkv_sglang.bench import resident
from fairkv_sglang.bench.clocks import captured
from fairkv_sglang.bench.gpu.report import need, require
from fairkv_sglang.kernels import PAGE_TOKENS, HeadPages
from fairkv_sglang.kernels.cuda import operations as triton_ops
from fairkv_sglang.kernels.cuda.flashinfer import FlashInferDecoder
from fairkv_tests import reference
from fairkv_tests.gpu_checks import copy_to, difference


def planned_decode(**options: Any) -> Callable[..., None]:
    """`Kernels.decode` through FlashInferDecoder, for checks; options are those of that class."""

    def decode(
        pages: HeadPages,
        q: torch.Tensor,
        rows: torch.Tensor,
        lane_lo: int,
        n: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        need(lane_lo == 0 and n == pages.lanes, "planned_decode serves one layer of all lanes")
        decoder = FlashInferDecoder(pages, [0, n], q.shape[1] // n, **options)
        decoder.plan(rows)
        decoder.decode(q, rows, 0, n, scale, out)

    return decode


def flashinfer_plan(dim: int) -> str:
    """Our plan equals FlashInfer's own planner's, and its kernel takes it."""
    require("flashinfer", "FlashInfer")
    import flashinfer

    from fairkv_sglang.kernels.cuda.flashinfer_check import assert_plan_matches_flashinfer

    start = time.perf_counter()
    for group in (1, 4, 8):
        assert_plan_matches_flashinfer(torch.bfloat16, dim, group)
    seconds = time.perf_counter() - start
    return f"FlashInfer {flashinfer.__version__}, {seconds:.0f} s with compilation"


def orders_agree(device: str, dim: int, **options: Any) -> None:
    """Longest first, FlashInfer's order and other spare tiles at the same chunk: equal bits."""
    # Short: the chunk is 128 for every number of spare tiles below.
    lens = resident.lengths("lognormal", 64, 100).view(16, 4)
    pages = resident.resident(lens, dim, torch.bfloat16, device, by_columns=False)
    rows = torch.arange(1, 17, device=device)
    q = torch.randn((16, 16, dim), device=device).bfloat16()
    results = []
    for longest_first, spare in ((True, 264), (False, 264), (True, 132), (True, 1000)):
        decoder = FlashInferDecoder(
            pages, [0, 4], 4, spare=spare, longest_first=longest_first, **options
        )
        out = torch.empty_like(q)
        decoder.plan(rows)
        decoder.decode(q, rows, 0, 4, 0.1, out)
        results.append(out)
    need(all(torch.equal(results[0], x) for x in results[1:]), "tile order changes the result")


def replayed_step(device: str, dim: int, rounds: int = 5, **options: Any) -> None:
    """A captured step (grow, plan, append, decode of two layers), replayed over many batches."""
    lens = torch.tensor([[15, 16, 300, 5], [200, 0, 31, 64], [1000, 77, 15, 128]])
    bs, group, lane_start = 3, 4, [0, 1, 4]
    pages = resident.resident(lens, dim, torch.bfloat16, device, by_columns=False)
    twin = copy_to(pages, device)
    decoder = FlashInferDecoder(pages, lane_start, group, **options)
    rows = torch.zeros(bs, dtype=torch.int64, device=device)
    slots = torch.empty((bs, 4), dtype=torch.int64, device=device)
    kv = torch.randn((bs, 8, dim), device=device).bfloat16()
    q = torch.randn((bs, 4 * group, dim), device=device).bfloat16()
    out = torch.empty_like(q)

    def step() -> None:
        triton_ops.grow(pages, rows, slots)
        decoder.plan(rows)
        for layer, (a, b) in enumerate(itertools.pairwise(lane_start)):
            triton_ops.append(pages, slots[:, a:b], kv[:, a:b], kv[:, 4 + a : 4 + b])
            part = torch.empty((bs, (b - a) * group, dim), dtype=q.dtype, device=device)
            queries = q[:, a * group : b * group]
            decoder.decode(queries, rows, layer, b - a, dim**-0.5, part)
            out[:, a * group : b * group].copy_(part)

    replay = captured(step, device)  # on padding rows alone: changes nothing
    want, twin_slots = torch.empty_like(q), torch.empty_like(slots)
    for order in ([1, 2, 3], [3, 0, 1], [0, 0, 2], [2, 3, 1]) * rounds:
        rows.copy_(torch.tensor(order))
        kv.normal_()
        q.normal_()
        replay()
        reference.grow(twin, rows, twin_slots)
        need(torch.equal(slots, twin_slots), "slots differ")
        for a, b in itertools.pairwise(lane_start):
            reference.append(twin, twin_slots[:, a:b], kv[:, a:b], kv[:, 4 + a : 4 + b])
            part = torch.empty((bs, (b - a) * group, dim), dtype=q.dtype, device=device)
            queries = q[:, a * group : b * group].contiguous()
            reference.decode(twin, queries, rows, a, b - a, dim**-0.5, part)
            want[:, a * group : b * group] = part
        worst = difference(out, want)
        need(worst <= 2e-2, f"differs from torch by {worst:.3g}")
    pages.check_integrity()


def operations(device: str, dim: int, **options: Any) -> dict[str, Callable[[], object]]:
    """Every operation of serving on a small problem, by name, to be called in this order."""
    pages = HeadPages.create(64, 4, 5, 8, dim, torch.bfloat16, device, by_columns=False)
    row, rows = torch.tensor([1], device=device), torch.tensor([1, 0], device=device)
    owned = torch.ones(5, dtype=torch.uint8, device=device)
    pool = torch.randn((60, 10, dim), device=device).bfloat16()
    kept = torch.arange(40, device=device).repeat(5, 1)
    counts = torch.full((5,), 33, device=device)
    columns = torch.tensor([2, 0, -1, 4, 4], device=device)
    arguments = (torch.arange(60, device=device), kept, counts, columns)
    slots = torch.empty((2, 5), dtype=torch.int64, device=device)
    kv = torch.randn((2, 10, dim), device=device).bfloat16()
    q = torch.randn((2, 20, dim), device=device).bfloat16()
    out = torch.empty_like(q)
    decoder = FlashInferDecoder(pages, [0, 5], 4, **options)
    return {
        "set_owned": lambda: triton_ops.set_owned(pages, 1, owned),
        "store_kept": lambda: triton_ops.store_kept(
            pages, 1, 0, pool[:, :5], pool[:, 5:], *arguments
        ),
        "grow": lambda: triton_ops.grow(pages, rows, slots),
        "plan": lambda: decoder.plan(rows),
        "append": lambda: triton_ops.append(pages, slots, kv[:, :5], kv[:, 5:]),
        "decode": lambda: decoder.decode(q, rows, 0, 5, 0.1, out),
        "Triton decode": lambda: triton_ops.decode(pages, q, rows, 0, 5, 0.1, out),
        "release": lambda: triton_ops.release(pages, row),
    }


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """Raises where torch sees that the host waits for the device; on the CPU nothing is seen."""
    set_mode = torch.cuda.set_sync_debug_mode if device == "cuda" else str
    set_mode("error")
    try:
        yield
    except RuntimeError as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise RuntimeError(f"{Path(at.filename).name}:{at.lineno}: {at.line}: {error}") from error
    finally:
        set_mode("default")


def no_host_synchronisation(dim: int) -> str:
    """No operation waits for the device, so planning costs the host nothing but launches.

    torch reports what it can see of it; that a step can be captured in a graph shows the rest.
    """
    todo = operations("cuda", dim)
    for work in todo.values():  # compilation may wait
        work()
    torch.cuda.synchronize()
    waiting = []
    for name, work in todo.items():
        try:
            with without_waiting("cuda"):
                work()
        except RuntimeError as error:
            waiting.append(f"{name}: {str(error).splitlines()[0]}")
    need(not waiting, "waits for the device: " + "; ".join(waiting))
    return ", ".join(todo)


def large_arena(device: str, dim: int, elements: int = 2**31, **options: Any) -> str:
    """A prompt, a token and its attention in the last pages of an arena, past `elements`."""
    group, heads, kept, scale = 4, 3, 600, dim**-0.5
    count = elements // (PAGE_TOKENS * dim) + 256
    pages = HeadPages.create(count, 2, heads, 64, dim, torch.bfloat16, device, by_columns=False)
    pages.free_pages.copy_(pages.free_pages.flip(0))  # the last page is on top
    triton_ops.set_owned(pages, 1, torch.ones(heads, dtype=torch.uint8, device=device))
    make = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make, device=device).bfloat16()

    k, v = random(kept, heads, dim), random(kept, heads, dim)
    at, rows = torch.arange(kept, device=device), torch.tensor([1], device=device)
    counts = torch.full((heads,), kept, device=device)
    triton_ops.store_kept(pages, 1, 0, k, v, at, at.repeat(heads, 1), counts)
    slots = torch.empty((1, heads), dtype=torch.int64, device=device)
    triton_ops.grow(pages, rows, slots)
    need(int(slots.min()) * dim >= elements, "the arena's last pages are not taken first")
    new = random(2, 1, heads, dim)
    triton_ops.append(pages, slots, new[0], new[1])
    k, v = torch.cat([k, new[0]]).double(), torch.cat([v, new[1]]).double()
    q = random(1, heads * group, dim)
    folded = q.view(heads, group, dim).double()
    weights = (torch.einsum("hgd,nhd->hgn", folded, k) * scale).softmax(-1)
    want = torch.einsum("hgn,nhd->hgd", weights, v).view(q.shape)
    decoder = FlashInferDecoder(pages, [0, heads], group, **options)
    for name in ("FlashInfer", "Triton"):
        if name == "Triton" and device == "cpu":
            continue  # the interpreter's dot product takes bfloat16 for integers
        out = torch.full_like(q, torch.nan)
        if name == "FlashInfer":
            decoder.plan(rows)
            decoder.decode(q, rows, 0, heads, scale, out)
        else:
            triton_ops.decode(pages, q, rows, 0, heads, scale, out)
        worst = difference(out, want)
        need(worst <= 2e-2, f"{name} decode differs from torch by {worst:.3g}")
    triton_ops.release(pages, rows)
    pages.check_integrity()
    return f"{count:,} pages"

# SPDX-License-Identifier: Apache-2.0
"""The operations of `interface` on CUDA tensors: Triton kernels and their launchers.

No operation waits for the device, so a decode step can be captured in a CUDA graph. Page ids come
off the stack in the same order as on the CPU, so both give equal tables. Checked with Triton's
interpreter on CPU tensors; not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fairkv_sglang.kernels.interface import PromptKernels
from fairkv_sglang.kernels.layout import (
    ERROR_NO_FREE_PAGE,
    ERROR_ROW_FULL,
    ERROR_ROW_NOT_EMPTY,
    PADDING_ROW,
    PAGE_TOKENS,
    RUN_PAGES,
    UNLIMITED,
    PageTensors,
)

from . import attention, score, store
from . import prompts as of_prompts
from .lookup import page_of

GROW_BLOCK = 1024


@triton.jit(do_not_specialize=["cells"])
def _count_new_pages(  # type: ignore[no-untyped-def]
    lens, owned, most, rows, rows_stride, counts, cells, lanes, max_pages,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many pages each block of (row, lane) cells takes off the stack."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < cells
    cell = tl.load(rows + at // lanes * rows_stride, mask=live, other=0) * lanes + at % lanes
    mine = live & (tl.load(owned + cell, mask=live, other=0) != 0)
    n = tl.load(lens + cell, mask=mine, other=1)
    limit = tl.load(most + at % lanes, mask=mine, other=0)
    wants = (n % PAGE == 0) & (n // PAGE < max_pages) & ((limit == 0) | (n < limit))
    tl.store(counts + tl.program_id(0), tl.sum(wants.to(tl.int32), 0))


@triton.jit(do_not_specialize=["cells"])
def _grow(  # type: ignore[no-untyped-def]
    table, runs, lens, owned, stack, count, error, rows, rows_stride, slots, slots_stride,
    most, turn, counts, cells, lanes, max_pages,
    PAGE: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, NO_PAGE: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """A block of cells; pages come off the stack in the order of the cells."""
    block = tl.program_id(0)
    taken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, block, BLOCK):
        b = start + tl.arange(0, BLOCK)
        taken += tl.load(counts + b, mask=b < block, other=0)
    free = tl.load(count)
    at = block * BLOCK + tl.arange(0, BLOCK)
    live = at < cells
    i, lane = at // lanes, at % lanes
    row = tl.load(rows + i * rows_stride, mask=live, other=0)
    cell = row * lanes + lane
    mine = live & (tl.load(owned + cell, mask=live, other=0) != 0)
    held = tl.load(lens + cell, mask=mine, other=0)
    limit = tl.load(most + lane, mask=mine, other=0)
    ring = mine & (limit > 0) & (held >= limit)
    n = tl.where(ring, tl.load(turn + cell, mask=ring, other=0), held)
    number = n // PAGE
    starts_page = mine & (n % PAGE == 0) & (ring == 0)
    full = starts_page & (n // PAGE >= max_pages)
    wants = starts_page & (n // PAGE < max_pages)
    order = tl.sum(taken.to(tl.int64), 0) + tl.cumsum(wants.to(tl.int64), 0)
    gets = wants & (order <= free)
    continues = mine & ((n % PAGE != 0) | ring)
    fresh = tl.load(stack + (free - order), mask=gets, other=0)
    entry = table + cell * (max_pages // RUN) + number // RUN
    starts_run = gets & (number % RUN == 0)
    tl.store(entry, fresh, mask=starts_run)
    done = gets | continues
    first = tl.where(starts_run, fresh, tl.load(entry, mask=done & ~starts_run, other=0))
    place = runs + first.to(tl.int64) * RUN + number % RUN
    tl.store(place, fresh, mask=gets)
    page = tl.where(gets, fresh, tl.load(place, mask=continues, other=0))
    slot = page.to(tl.int64) * PAGE + n % PAGE
    tl.store(slots + i.to(tl.int64) * slots_stride + lane, tl.where(done, slot, -1), mask=live)
    tl.store(lens + cell, n + 1, mask=done & (ring == 0))
    tl.store(turn + cell, (n + 1) % tl.maximum(limit, 1), mask=ring)
    bits = tl.max((wants & (order > free)).to(tl.int32), 0) * NO_PAGE
    bits |= tl.max(full.to(tl.int32), 0) * FULL
    tl.atomic_or(error, bits, mask=bits != 0)


@triton.jit(do_not_specialize=["blocks"])
def _pop(count, counts, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """After `_grow`, whose blocks all read the old top of the stack."""
    taken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, blocks, BLOCK):
        b = start + tl.arange(0, BLOCK)
        taken += tl.load(counts + b, mask=b < blocks, other=0)
    free = tl.load(count)
    tl.store(count, free - tl.minimum(tl.sum(taken.to(tl.int64), 0), free))


@triton.jit
def _release(  # type: ignore[no-untyped-def]
    table, runs, stack, rows, held, offsets, lanes, max_runs, RUN: tl.constexpr, BLOCK: tl.constexpr
):
    """One program pushes the pages of one (row, lane), the last page first."""
    at = tl.program_id(0)
    row = tl.load(rows + at // lanes)
    n = tl.load(held + at)
    first = tl.load(offsets + at)
    cell = row * lanes + at % lanes
    for start in range(0, n, BLOCK):
        p = start + tl.arange(0, BLOCK)
        page = page_of(table, runs, cell, p, max_runs, p < n, RUN).to(tl.int32)
        tl.store(stack + first + n - 1 - p, page, mask=p < n)


@triton.jit
def _append(  # type: ignore[no-untyped-def]
    k_pages, v_pages, slots, slots_stride, k, v, k_row, k_head, v_row, v_head,
    q, folded, q_row, q_head, n, group,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Program (i, h) writes one K and one V row, and copies the query heads of its group."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, D_PAD)
    slot = tl.load(slots + i * slots_stride + h)
    if slot >= 0:
        k_new = tl.load(k + i * k_row + h * k_head + d, mask=d < D)
        v_new = tl.load(v + i * v_row + h * v_head + d, mask=d < D)
        tl.store(k_pages + slot * D + d, k_new, mask=d < D)
        tl.store(v_pages + slot * D + d, v_new, mask=d < D)
    for j in range(h * group, h * group + group):
        query = tl.load(q + i * q_row + j * q_head + d, mask=d < D)
        tl.store(folded + (i * n * group + j) * D + d, query, mask=d < D)


def set_owned(pages: PageTensors, row: int, owned: torch.Tensor, room: int = UNLIMITED) -> None:
    if row == PADDING_ROW:
        raise ValueError(f"row {PADDING_ROW} pads batches and owns no lane; use a row from 1 on")
    busy = (pages.lens[row] != 0).any()
    pages.error.bitwise_or_(busy.to(torch.int32) * ERROR_ROW_NOT_EMPTY)
    pages.owned[row].copy_(owned)
    pages.room[row].fill_(room)
    pages.turn[row].zero_()


def grow(pages: PageTensors, rows: torch.Tensor, slots: torch.Tensor) -> None:
    cells = rows.shape[0] * pages.lanes
    blocks = triton.cdiv(cells, GROW_BLOCK)
    if blocks == 0:
        return
    counts = torch.empty(blocks, dtype=torch.int32, device=pages.device)
    shared = (counts, cells, pages.lanes, pages.max_pages)
    _count_new_pages[(blocks,)](
        pages.lens, pages.owned, pages.most, rows, rows.stride(0), *shared,
        PAGE=PAGE_TOKENS, BLOCK=GROW_BLOCK,
    )  # fmt: skip
    _grow[(blocks,)](
        pages.page_table, pages.runs, pages.lens, pages.owned, pages.free_pages, pages.free_count,
        pages.error, rows, rows.stride(0), slots, slots.stride(0), pages.most, pages.turn, *shared,
        PAGE=PAGE_TOKENS, RUN=RUN_PAGES, BLOCK=GROW_BLOCK, NO_PAGE=ERROR_NO_FREE_PAGE,
        FULL=ERROR_ROW_FULL,
    )  # fmt: skip
    _pop[(1,)](pages.free_count, counts, blocks, BLOCK=GROW_BLOCK)


def release(pages: PageTensors, rows: torch.Tensor) -> None:
    if rows.shape[0] == 0:
        return
    rows = rows.contiguous()
    again = (rows[:, None] == rows[None, :]).tril(-1).any(1)  # a row named twice is freed once
    held = (pages.lens[rows] + (PAGE_TOKENS - 1)) // PAGE_TOKENS
    held = held.masked_fill(again[:, None], 0).to(torch.int64).view(-1)
    ends = held.cumsum(0)
    offsets = pages.free_count + ends - held
    _release[(held.shape[0],)](
        pages.page_table, pages.runs, pages.free_pages, rows, held, offsets, pages.lanes,
        pages.max_runs, RUN=RUN_PAGES, BLOCK=128,
    )  # fmt: skip
    pages.free_count += ends[-1:]
    # An assignment of a number through an index would wait for the device.
    pages.lens.index_fill_(0, rows, 0)
    pages.owned.index_fill_(0, rows, 0)


def append(
    pages: PageTensors,
    slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q: torch.Tensor | None = None,
    folded: torch.Tensor | None = None,
) -> None:
    """See `Kernels.append`; copies q [bs, n * g, D] to the contiguous `folded`, if given."""
    bs, n = slots.shape
    dim = pages.head_dim
    if bs == 0:
        return
    if slots.stride(1) != 1 or k.stride(2) != 1 or v.stride(2) != 1:
        raise ValueError("append: slots, k and v must be contiguous in their last dimension")
    copied = (k, k, 0, 0, n, 0)
    if q is not None and folded is not None:
        if q.stride(2) != 1 or not folded.is_contiguous() or folded.shape != q.shape:
            raise ValueError("append: q must be contiguous in its last dimension, its copy in all")
        copied = (q, folded, q.stride(0), q.stride(1), n, q.shape[1] // n)
    _append[(bs, n)](
        pages.k_pages, pages.v_pages, slots, slots.stride(0), k, v,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), *copied,
        D=dim, D_PAD=triton.next_power_of_2(dim),
    )  # fmt: skip


decode = attention.decode
store_kept = store.store_kept
snapkv_score = score.snapkv_score
prompts: PromptKernels | None = of_prompts

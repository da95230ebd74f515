# SPDX-License-Identifier: Apache-2.0
"""The operations of `interface` on CUDA tensors: Triton kernels and their launchers.

No operation waits for the device. Launchers of `grow`, `append` and `decode` make no tensors, so a
decode step can be captured in a CUDA graph. Page ids come off the stack in the same order as on the
CPU, so both give equal tables. Checked with Triton's interpreter on CPU tensors; not yet run on a
GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fairkv_sglang.kernels.pages import (
    ERROR_INDEX,
    ERROR_NO_FREE_PAGE,
    ERROR_ROW_FULL,
    ERROR_ROW_NOT_EMPTY,
    PADDING_ROW,
    PAGE_TOKENS,
    HeadPages,
)

from . import attention, score

GROW_BLOCK = 1024


@triton.jit
def _grow(  # type: ignore[no-untyped-def]
    table, lens, owned, stack, count, error, rows, rows_stride, slots, slots_stride,
    cells, lanes, max_pages,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, NO_PAGE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One program walks over all (row, lane) cells, so that the stack is popped in their order."""
    free = tl.load(count)
    taken = free - free
    bits = tl.load(error)
    for start in range(0, cells, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = at < cells
        i, lane = at // lanes, at % lanes
        row = tl.load(rows + i * rows_stride, mask=live, other=0)
        cell = row * lanes + lane
        mine = live & (tl.load(owned + cell, mask=live, other=0) != 0)
        n = tl.load(lens + cell, mask=mine, other=0)
        entry = cell * max_pages + n // PAGE
        starts_page = mine & (n % PAGE == 0)
        full = starts_page & (n // PAGE >= max_pages)
        wants = starts_page & (n // PAGE < max_pages)
        order = taken + tl.cumsum(wants.to(tl.int64), 0)
        gets = wants & (order <= free)
        continues = mine & (n % PAGE != 0)
        fresh = tl.load(stack + (free - order), mask=gets, other=0)
        tl.store(table + entry, fresh, mask=gets)
        page = tl.where(gets, fresh, tl.load(table + entry, mask=continues, other=0))
        done = gets | continues
        slot = page.to(tl.int64) * PAGE + n % PAGE
        tl.store(slots + i.to(tl.int64) * slots_stride + lane, tl.where(done, slot, -1), mask=live)
        tl.store(lens + cell, n + 1, mask=done)
        bits |= tl.max((wants & (order > free)).to(tl.int32), 0) * NO_PAGE
        bits |= tl.max(full.to(tl.int32), 0) * FULL
        taken += tl.sum(wants.to(tl.int64), 0)
    tl.store(count, free - tl.minimum(taken, free))
    tl.store(error, bits)


@triton.jit
def _release(  # type: ignore[no-untyped-def]
    table, stack, rows, held, offsets, lanes, max_pages, BLOCK: tl.constexpr
):
    """One program pushes the pages of one (row, lane), the last page first."""
    at = tl.program_id(0)
    row = tl.load(rows + at // lanes)
    n = tl.load(held + at)
    first = tl.load(offsets + at)
    entry = table + (row * lanes + at % lanes) * max_pages
    for start in range(0, n, BLOCK):
        p = start + tl.arange(0, BLOCK)
        page = tl.load(entry + p, mask=p < n, other=0)
        tl.store(stack + first + n - 1 - p, page, mask=p < n)


@triton.jit
def _store_kept(  # type: ignore[no-untyped-def]
    table, k_pages, v_pages, k_pool, v_pool, token_slots, kept, kept_stride,
    columns, tokens, new_pages, need, before, lane_entry, max_pages,
    k_slot, k_head, v_slot, v_head,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Program (j, p) fills page p of lane j: 16 gathered rows of K and of V of its column."""
    j, p = tl.program_id(0), tl.program_id(1)
    if p < tl.load(need + j):
        c = tl.load(columns + j)
        page = tl.load(new_pages - (tl.load(before + j) + p)).to(tl.int64)
        tl.store(table + lane_entry + j * max_pages + p, page.to(tl.int32))
        t, d = tl.arange(0, PAGE), tl.arange(0, D_PAD)
        live = p * PAGE + t < tl.load(tokens + j)
        position = tl.load(kept + c * kept_stride + p * PAGE + t, mask=live, other=0)
        slot = tl.load(token_slots + position, mask=live, other=0)
        both = live[:, None] & (d < D)[None, :]
        k = tl.load(k_pool + (slot * k_slot + c * k_head)[:, None] + d[None, :], mask=both)
        v = tl.load(v_pool + (slot * v_slot + c * v_head)[:, None] + d[None, :], mask=both)
        to = (page * PAGE + t)[:, None] * D + d[None, :]
        tl.store(k_pages + to, k, mask=both)
        tl.store(v_pages + to, v, mask=both)


@triton.jit
def _append(  # type: ignore[no-untyped-def]
    k_pages, v_pages, slots, slots_stride, k, v, k_row, k_head, v_row, v_head,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Program (i, h) writes one K and one V row."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + i * slots_stride + h)
    if slot >= 0:
        d = tl.arange(0, D_PAD)
        k_new = tl.load(k + i * k_row + h * k_head + d, mask=d < D)
        v_new = tl.load(v + i * v_row + h * v_head + d, mask=d < D)
        tl.store(k_pages + slot * D + d, k_new, mask=d < D)
        tl.store(v_pages + slot * D + d, v_new, mask=d < D)


def set_owned(pages: HeadPages, row: int, owned: torch.Tensor) -> None:
    if row == PADDING_ROW:
        raise ValueError(f"row {PADDING_ROW} pads batches and owns no lane; use a row from 1 on")
    busy = (pages.lens[row] != 0).any()
    pages.error.bitwise_or_(busy.to(torch.int32) * ERROR_ROW_NOT_EMPTY)
    pages.owned[row].copy_(owned)


def grow(pages: HeadPages, rows: torch.Tensor, slots: torch.Tensor) -> None:
    _grow[(1,)](
        pages.page_table, pages.lens, pages.owned, pages.free_pages, pages.free_count,
        pages.error, rows, rows.stride(0), slots, slots.stride(0),
        rows.shape[0] * pages.lanes, pages.lanes, pages.max_pages,
        PAGE=PAGE_TOKENS, BLOCK=GROW_BLOCK, NO_PAGE=ERROR_NO_FREE_PAGE, FULL=ERROR_ROW_FULL,
    )  # fmt: skip


def release(pages: HeadPages, rows: torch.Tensor) -> None:
    if rows.shape[0] == 0:
        return
    rows = rows.contiguous()
    again = (rows[:, None] == rows[None, :]).tril(-1).any(1)  # a row named twice is freed once
    held = (pages.lens[rows] + (PAGE_TOKENS - 1)) // PAGE_TOKENS
    held = held.masked_fill(again[:, None], 0).to(torch.int64).view(-1)
    ends = held.cumsum(0)
    offsets = pages.free_count + ends - held
    _release[(held.shape[0],)](
        pages.page_table, pages.free_pages, rows, held, offsets, pages.lanes, pages.max_pages,
        BLOCK=128,
    )  # fmt: skip
    pages.free_count += ends[-1:]
    # An assignment of a number through an index would wait for the device.
    pages.lens.index_fill_(0, rows, 0)
    pages.owned.index_fill_(0, rows, 0)


def store_kept(
    pages: HeadPages,
    row: int,
    lane_lo: int,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    token_slots: torch.Tensor,
    kept_idx: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor | None = None,
) -> None:
    m, most = kept_idx.shape
    if columns is None:
        columns = torch.arange(m, device=pages.device)
    n, dim = columns.shape[0], pages.head_dim
    if counts.shape[0] != m or any(x.shape[1:] != (m, dim) for x in (k_pool, v_pool)):
        raise ValueError(f"store_kept: counts and pools must have {m} columns, as kept_idx has")
    if k_pool.stride(2) != 1 or v_pool.stride(2) != 1:
        raise ValueError("store_kept: pools must be contiguous in their last dimension")
    if not 0 <= lane_lo <= pages.lanes - n:
        raise ValueError(f"store_kept: {n} lanes from {lane_lo} on, of {pages.lanes}")
    if n == 0:
        return
    # A column out of range, below or above, finds the zero at the end: the host cannot look at it,
    # and an index past the end would stop the device.
    columns = columns.clamp(-1, m).contiguous()
    tokens = F.pad(counts, (0, 1))[columns]
    mine = slice(lane_lo, lane_lo + n)
    takes, lens = (pages.owned[row, mine] != 0) & (columns >= 0), pages.lens[row, mine]
    need = (tokens + (PAGE_TOKENS - 1)) // PAGE_TOKENS * takes
    total = need.sum()
    # All or nothing, decided on the device.
    lacking = total > pages.free_count
    full = (need > pages.max_pages).any()
    busy = ((lens != 0) & takes).any()
    outside = (columns == m).any()
    bits = lacking.int() * ERROR_NO_FREE_PAGE + full.int() * ERROR_ROW_FULL
    bits += busy.int() * ERROR_ROW_NOT_EMPTY + outside.int() * ERROR_INDEX
    pages.error.bitwise_or_(bits)
    fits = ~(lacking | full | busy | outside)
    need = need * fits
    before = pages.num_pages - pages.free_count + need.cumsum(0) - need
    _store_kept[(n, max(1, triton.cdiv(most, PAGE_TOKENS)))](
        pages.page_table, pages.k_pages, pages.v_pages, k_pool, v_pool, token_slots,
        kept_idx, kept_idx.stride(0), columns, tokens, pages.free_pages[-1:], need, before,
        (row * pages.lanes + lane_lo) * pages.max_pages, pages.max_pages,
        k_pool.stride(0), k_pool.stride(1), v_pool.stride(0), v_pool.stride(1),
        D=dim, D_PAD=triton.next_power_of_2(dim), PAGE=PAGE_TOKENS,
    )  # fmt: skip
    pages.free_count -= need.sum()
    lens.copy_(torch.where(takes & fits, tokens.to(torch.int32), lens))


def append(pages: HeadPages, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    bs, n = slots.shape
    dim = pages.head_dim
    if bs == 0:
        return
    if slots.stride(1) != 1 or k.stride(2) != 1 or v.stride(2) != 1:
        raise ValueError("append: slots, k and v must be contiguous in their last dimension")
    _append[(bs, n)](
        pages.k_pages, pages.v_pages, slots, slots.stride(0), k, v,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        D=dim, D_PAD=triton.next_power_of_2(dim),
    )  # fmt: skip


decode = attention.decode
snapkv_score = score.snapkv_score

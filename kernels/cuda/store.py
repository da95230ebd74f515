# SPDX-License-Identifier: Apache-2.0
"""Kept rows of prompts into head pages, in Triton: two launches for all prompts of a layer.

What does not fit, into the arena or into the room of its row, is left out as a whole, decided on
the device. Checked with Triton's interpreter on CPU tensors; not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fairkv_sglang.kernels.layout import (
    ERROR_INDEX,
    ERROR_NO_FREE_PAGE,
    ERROR_ROW_FULL,
    ERROR_ROW_NOT_EMPTY,
    PAGE_TOKENS,
    RUN_PAGES,
    PageTensors,
)


@triton.jit(do_not_specialize=["prompts", "lane_lo", "n", "columns_stride", "counts_stride"])
def _take_pages(  # type: ignore[no-untyped-def]
    lens, owned, room, count, error, rows, prompts, lane_lo, n, lanes, max_pages,
    columns, columns_stride, counts, counts_stride, m, need_to, top_to,
    PAGE: tl.constexpr, LANES: tl.constexpr, NO_PAGE: tl.constexpr, FULL: tl.constexpr,
    BUSY: tl.constexpr, OUTSIDE: tl.constexpr,
):  # fmt: skip
    """One program for one layer's lanes: all of a prompt's pages off the stack, or none."""
    j = tl.arange(0, LANES)
    free = tl.load(count)
    bits = tl.zeros((1,), tl.int32)
    for p in range(prompts):
        row = tl.load(rows + p)
        cell = row * lanes + lane_lo + j
        c = tl.load(columns + p * columns_stride + j, mask=j < n, other=-1)
        mine = (c >= 0) & (tl.load(owned + cell, mask=j < n, other=0) != 0)
        tokens = tl.load(counts + p * counts_stride + c, mask=mine & (c < m), other=0)
        held = tl.load(lens + cell, mask=mine, other=0)
        need = tl.cdiv(tokens, PAGE)
        left = tl.load(room + row)
        over = (tl.sum(need, 0) > left).to(tl.int32)
        lacking = (tl.sum(need, 0) > free).to(tl.int32) * (1 - over)
        full = tl.max((need > max_pages).to(tl.int32), 0)
        busy = tl.max((held != 0).to(tl.int32), 0)
        outside = tl.max((c >= m).to(tl.int32), 0)
        bits |= lacking * NO_PAGE | full * FULL | busy * BUSY | outside * OUTSIDE
        fits = 1 - (over | lacking | full | busy | outside)
        need *= fits
        tl.store(room + row, tl.where(over != 0, 0, left - tl.sum(need, 0)))
        tl.store(need_to + p * LANES + j, need)
        tl.store(top_to + p * LANES + j, free - 1 - (tl.cumsum(need, 0) - need))
        tl.store(lens + cell, tokens.to(tl.int32), mask=mine.to(tl.int32) * fits != 0)
        free -= tl.sum(need, 0)
    tl.store(count, free)
    tl.atomic_or(error + tl.arange(0, 1), bits, mask=bits != 0)


@triton.jit(do_not_specialize=["kept_prompt", "kept_head", "columns_stride", "lane_lo"])
def _store_kept(  # type: ignore[no-untyped-def]
    table, runs, k_pages, v_pages, k_pool, v_pool, slots, slots_row, kept, kept_prompt, kept_head,
    columns, columns_stride, lens, stack, need, top, rows, lane_lo, lanes, max_runs,
    k_slot, k_head, v_slot, v_head,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, RUN: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Program (j, page, prompt) fills a page of lane j: 16 gathered rows of K and of V."""
    j, at, p = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if at < tl.load(need + p * LANES + j):
        c = tl.load(columns + p * columns_stride + j)
        row = tl.load(rows + p)
        cell = row * lanes + lane_lo + j
        taken = stack + tl.load(top + p * LANES + j)
        page = tl.load(taken - at).to(tl.int64)
        first = tl.load(taken - at // RUN * RUN).to(tl.int64)  # of its run
        tl.store(table + cell * max_runs + at // RUN, first.to(tl.int32))
        tl.store(runs + first * RUN + at % RUN, page.to(tl.int32))
        t, d = tl.arange(0, PAGE), tl.arange(0, D_PAD)
        live = at * PAGE + t < tl.load(lens + cell)
        from_row = kept + p.to(tl.int64) * kept_prompt + c * kept_head
        position = tl.load(from_row + at * PAGE + t, mask=live, other=0)
        slot = tl.load(slots + row * slots_row + position, mask=live, other=0).to(tl.int64)
        both = live[:, None] & (d < D)[None, :]
        k = tl.load(k_pool + (slot * k_slot + c * k_head)[:, None] + d[None, :], mask=both)
        v = tl.load(v_pool + (slot * v_slot + c * v_head)[:, None] + d[None, :], mask=both)
        to = (page * PAGE + t)[:, None] * D + d[None, :]
        tl.store(k_pages + to, k, mask=both)
        tl.store(v_pages + to, v, mask=both)


def store_kept(
    pages: PageTensors,
    row: int,
    lane_lo: int,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    token_slots: torch.Tensor,
    kept_idx: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor | None = None,
) -> None:
    if columns is None:
        columns = torch.arange(kept_idx.shape[0], device=pages.device)
    rows = torch.full((1,), row, dtype=torch.int64, device=pages.device)
    store_all_kept(
        pages, rows, lane_lo, k_pool, v_pool, token_slots.expand(pages.rows, -1), kept_idx[None],
        counts[None], columns[None],
    )  # fmt: skip


def store_all_kept(
    pages: PageTensors,
    rows: torch.Tensor,
    lane_lo: int,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
    kept_idx: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor,
) -> None:
    """`Kernels.store_kept` for several prompts, in two launches.

    Args:
        rows: int64 [P] of the prompts, all different.
        slots: int [rows, context] SGLang's request table: pool slot of each (row, position).
        kept_idx: int64 [P, m, most].
        counts: int64 [P, m].
        columns: int64 [P, n].
    """
    (prompts, m, most), n, dim = kept_idx.shape, columns.shape[1], pages.head_dim
    if counts.shape[1] != m or any(x.shape[1:] != (m, dim) for x in (k_pool, v_pool)):
        raise ValueError(f"store_kept: counts and pools must have {m} columns, as kept_idx has")
    if k_pool.stride(2) != 1 or v_pool.stride(2) != 1:
        raise ValueError("store_kept: pools must be contiguous in their last dimension")
    if not 0 <= lane_lo <= pages.lanes - n:
        raise ValueError(f"store_kept: {n} lanes from {lane_lo} on, of {pages.lanes}")
    if n == 0:
        return
    lanes = triton.next_power_of_2(n)
    need, top = torch.empty((2, prompts, lanes), dtype=torch.int64, device=pages.device)
    _take_pages[(1,)](
        pages.lens, pages.owned, pages.room, pages.free_count, pages.error, rows, prompts, lane_lo,
        n, pages.lanes, pages.max_pages, columns, columns.stride(0), counts, counts.stride(0), m,
        need, top, PAGE=PAGE_TOKENS, LANES=lanes, NO_PAGE=ERROR_NO_FREE_PAGE, FULL=ERROR_ROW_FULL,
        BUSY=ERROR_ROW_NOT_EMPTY, OUTSIDE=ERROR_INDEX,
    )  # fmt: skip
    _store_kept[(n, max(1, triton.cdiv(most, PAGE_TOKENS)), prompts)](
        pages.page_table, pages.runs, pages.k_pages, pages.v_pages, k_pool, v_pool,
        slots, slots.stride(0),
        kept_idx, kept_idx.stride(0), kept_idx.stride(1), columns, columns.stride(0), pages.lens,
        pages.free_pages, need, top, rows, lane_lo, pages.lanes, pages.max_runs,
        k_pool.stride(0), k_pool.stride(1), v_pool.stride(0), v_pool.stride(1),
        D=dim, D_PAD=triton.next_power_of_2(dim), PAGE=PAGE_TOKENS, RUN=RUN_PAGES,
        LANES=lanes,
    )  # fmt: skip

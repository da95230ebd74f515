# SPDX-License-Identifier: Apache-2.0
"""Page bookkeeping and row copies on the CPU, compiled by numba.

Every function here first counts what it needs and returns an error bit of `pages` before it
changes anything, so an exhausted arena is never half written. Tensor data is passed as addresses
and byte strides: one compiled version serves every dtype and every strided view. Keys lie in their
pages by columns (see `pages`).
"""

from __future__ import annotations

from typing import Any

import numba as nb
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fairkv_sglang.kernels.layout import (
    ERROR_INDEX,
    ERROR_NO_FREE_PAGE,
    ERROR_ROW_FULL,
    ERROR_ROW_NOT_EMPTY,
    PAGE_TOKENS,
    RUN_PAGES,
)

# Bookkeeping arrays are made by HeadPages.create and always contiguous; rows and slots are not.
TABLE = types.Array(types.int32, 3, "C")
RUNS = types.Array(types.int32, 2, "C")
LENS = types.Array(types.int32, 2, "C")
OWNED = types.Array(types.uint8, 2, "C")
STACK = types.Array(types.int32, 1, "C")
MOST = types.Array(types.int32, 1, "C")
COUNT = types.Array(types.int64, 1, "C")
I64_1D = types.Array(types.int64, 1, "A")
I64_2D = types.Array(types.int64, 2, "A")
STATE = (TABLE, RUNS, LENS, OWNED, STACK, COUNT)
I64 = types.int64


@intrinsic  # type: ignore[untyped-decorator]
def _copy(typingctx: Any, dst: Any, src: Any, nbytes: Any) -> Any:
    """memcpy between two addresses given as integers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte_pointer = ir.IntType(8).as_pointer()
        to = builder.inttoptr(args[0], byte_pointer)
        of = builder.inttoptr(args[1], byte_pointer)
        cgutils.raw_memcpy(builder, to, of, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@nb.njit(inline="always")  # type: ignore[untyped-decorator]
def _copy_key(k_pages, slot, src, row_bytes):  # type: ignore[no-untyped-def]
    """One key into its column: word w of the token is word (w, offset) of the page."""
    to = k_pages + slot // PAGE_TOKENS * (PAGE_TOKENS * row_bytes) + slot % PAGE_TOKENS * 4
    for w in range(row_bytes // 4):
        _copy(to + w * (PAGE_TOKENS * 4), src + w * 4, 4)


@nb.njit(inline="always")  # type: ignore[untyped-decorator]
def _page(table, runs, row, lane, number):  # type: ignore[no-untyped-def]
    return nb.int64(runs[table[row, lane, number // RUN_PAGES], number % RUN_PAGES])


@nb.njit(inline="always")  # type: ignore[untyped-decorator]
def _put(table, runs, row, lane, number, page):  # type: ignore[no-untyped-def]
    if number % RUN_PAGES == 0:
        table[row, lane, number // RUN_PAGES] = page
    runs[table[row, lane, number // RUN_PAGES], number % RUN_PAGES] = page


@nb.njit(  # type: ignore[untyped-decorator]
    I64(*STATE, MOST, LENS, I64_1D, I64_2D), cache=True, nogil=True
)
def grow(  # type: ignore[no-untyped-def]
    table, runs, lens, owned, stack, count, most, turn, rows, slots
):
    """One more token for every owned lane of every row. Returns 0 or an error bit."""
    lanes, max_pages = lens.shape[1], table.shape[2] * RUN_PAGES
    need = 0
    for i in range(rows.shape[0]):
        r = rows[i]
        if r < 0 or r >= lens.shape[0]:
            return ERROR_INDEX
        for j in range(lanes):
            if owned[r, j] and lens[r, j] % PAGE_TOKENS == 0:
                if 0 < most[j] <= lens[r, j]:
                    continue
                need += 1
                if lens[r, j] // PAGE_TOKENS >= max_pages:
                    return ERROR_ROW_FULL
    if need > count[0]:
        return ERROR_NO_FREE_PAGE
    top = count[0]
    for i in range(rows.shape[0]):
        r = rows[i]
        for j in range(lanes):
            if not owned[r, j]:
                slots[i, j] = -1
                continue
            n = lens[r, j]
            full = 0 < most[j] <= n
            if full:
                n = turn[r, j]
                turn[r, j] = (n + 1) % most[j]
            page, offset = n // PAGE_TOKENS, n % PAGE_TOKENS
            if offset == 0 and not full:
                top -= 1
                _put(table, runs, r, j, page, stack[top])
            slots[i, j] = _page(table, runs, r, j, page) * PAGE_TOKENS + offset
            if not full:
                lens[r, j] = n + 1
    count[0] = top
    return 0


@nb.njit(I64(*STATE, I64_1D), cache=True, nogil=True)  # type: ignore[untyped-decorator]
def release(table, runs, lens, owned, stack, count, rows):  # type: ignore[no-untyped-def]
    """Give back every page of the rows; a row that holds none is left empty."""
    for i in range(rows.shape[0]):
        if rows[i] < 0 or rows[i] >= lens.shape[0]:
            return ERROR_INDEX
    top = count[0]
    for i in range(rows.shape[0]):
        r = rows[i]
        for j in range(lens.shape[1]):
            # Last page first, so that the next owner takes them in ascending order again: runs of
            # consecutive pages are read about twice as fast as scattered ones.
            for p in range((lens[r, j] + PAGE_TOKENS - 1) // PAGE_TOKENS - 1, -1, -1):
                stack[top] = _page(table, runs, r, j, p)
                top += 1
            lens[r, j] = 0
            owned[r, j] = 0
    count[0] = top
    return 0


@nb.njit(  # type: ignore[untyped-decorator]
    I64(*STATE, COUNT, *([I64] * 12), I64_1D, I64_2D, I64_1D, I64_1D), cache=True, nogil=True
)
def store_kept(  # type: ignore[no-untyped-def]
    table, runs, lens, owned, stack, count, room, row, lane_lo, k_to, v_to, row_bytes,
    k_from, k_stride, k_head, v_from, v_stride, v_head, pool_slots,
    token_slots, kept_idx, counts, columns,
):  # fmt: skip
    """Copy the kept rows of one layer's prompt into fresh pages. Returns 0 or an error bit.

    Lane lane_lo + j takes column columns[j] of the pools, kept_idx and counts. A column that no
    lane of the row takes may hold anything: it is not looked at. Where the row has no room for all
    of it, nothing is stored and no room left.
    """
    lanes, max_pages = columns.shape[0], table.shape[2] * RUN_PAGES
    if not (0 < row < lens.shape[0] and 0 <= lane_lo <= lens.shape[1] - lanes):
        return ERROR_INDEX
    need = 0
    for j in range(lanes):
        c = columns[j]
        if c >= counts.shape[0]:
            return ERROR_INDEX
        if c < 0 or not owned[row, lane_lo + j]:
            continue
        if counts[c] < 0 or counts[c] > kept_idx.shape[1]:
            return ERROR_INDEX
        for i in range(counts[c]):
            if not 0 <= kept_idx[c, i] < token_slots.shape[0]:
                return ERROR_INDEX
            if not 0 <= token_slots[kept_idx[c, i]] < pool_slots:
                return ERROR_INDEX
        pages = (counts[c] + PAGE_TOKENS - 1) // PAGE_TOKENS
        if lens[row, lane_lo + j] != 0:
            return ERROR_ROW_NOT_EMPTY
        if pages > max_pages:
            return ERROR_ROW_FULL
        need += pages
    if need > room[row]:
        room[row] = 0
        return 0
    if need > count[0]:
        return ERROR_NO_FREE_PAGE
    room[row] -= need
    top = count[0]
    for j in range(lanes):
        c, lane = columns[j], lane_lo + j
        if c < 0 or not owned[row, lane]:
            continue
        page = nb.int64(0)
        for i in range(counts[c]):
            offset = i % PAGE_TOKENS
            if offset == 0:
                top -= 1
                page = nb.int64(stack[top])
                _put(table, runs, row, lane, i // PAGE_TOKENS, page)
            slot = token_slots[kept_idx[c, i]]
            to = page * PAGE_TOKENS + offset
            _copy_key(k_to, to, k_from + slot * k_stride + c * k_head, row_bytes)
            _copy(v_to + to * row_bytes, v_from + slot * v_stride + c * v_head, row_bytes)
        lens[row, lane] = counts[c]
    count[0] = top
    return 0


@nb.njit(  # type: ignore[untyped-decorator]
    types.void(I64_2D, *([I64] * 9)), cache=True, nogil=True
)
def append(  # type: ignore[no-untyped-def]
    slots, k_to, v_to, row_bytes, k_from, k_stride, k_head, v_from, v_stride, v_head
):
    """Write one K and one V row per (request, head) to its slot; negative slots are skipped."""
    for i in range(slots.shape[0]):
        for h in range(slots.shape[1]):
            if slots[i, h] >= 0:
                to = slots[i, h]
                _copy_key(k_to, to, k_from + i * k_stride + h * k_head, row_bytes)
                _copy(v_to + to * row_bytes, v_from + i * v_stride + h * v_head, row_bytes)

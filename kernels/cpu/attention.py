# SPDX-License-Identifier: Apache-2.0
"""Decode attention over head pages on the CPU, compiled by numba for each (dtype, group, D).

One work item is one (request, head). Its keys are read page by page, each K row and each V row once
for all query heads of the group. The softmax runs online over blocks of BLOCK tokens that start at
token 0, so an item's result depends on nothing but its own rows: not on the batch, not on the
number of threads. Everything is accumulated in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numba as nb
import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba.core import types

from fairkv_sglang.kernels.layout import PAGE_TOKENS, RUN_PAGES

from . import simd
from .bookkeeping import I64, I64_1D, LENS, OWNED, RUNS, TABLE
from .simd import accumulate, highest_of, load_row, scores, store_row

BLOCK = RUN_PAGES * PAGE_TOKENS
"""Tokens whose scores are held at once; their float32 scores stay in the first-level cache."""

AHEAD_BYTES = 16384
"""How far ahead of the reads pages are asked for."""

HEADS_AT_ONCE = 8 if get_host_cpu_features().get("avx512f") else 4
"""Query heads whose scores of a page stay in registers."""

LOG2_E = math.log2(math.e)
FLAGS = {"contract", "reassoc", "arcp", "nsz"}  # fast-math but for NaN and infinity
SINKS = types.Array(types.float32, 1, "C")
LOWEST = np.float32(-1e30)  # "minus infinity" without its NaN
_EXP2 = [np.float32(math.log(2) ** k / math.factorial(k)) for k in range(8)]
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7 = _EXP2


@nb.njit(inline="always", fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def exp2(x):  # type: ignore[no-untyped-def]
    """2**x for float32 x <= 0, relative error below 3e-7; what is below 2**-126 becomes 2**-126.

    Taylor's series on [-1/2, 1/2], then the integer part is put into the exponent bits.
    """
    x = max(x, np.float32(-126.0))
    whole = np.int32(x - np.float32(0.5))
    f = x - np.float32(whole)
    y = _C6 + f * _C7
    y = _C5 + f * y
    y = _C4 + f * y
    y = _C3 + f * y
    y = _C2 + f * y
    y = _C1 + f * y
    y = _C0 + f * y
    return y * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)


@functools.cache
def kernel(code: int, group: int, dim: int) -> Callable[..., None]:
    """Compiled decode for one dtype code of `simd`, query heads per KV head and head dimension."""
    row_bytes = dim * simd.ITEM_BYTES[code]
    page_bytes, s_bytes, f_bytes = PAGE_TOKENS * row_bytes, BLOCK * 4, dim * 4
    # Query heads are taken together as far as their sums fit the registers: scores need one vector
    # a head and a few more, values a whole row. The first to read a page asks for a later one.
    tall = min(group, HEADS_AT_ONCE)
    rest = group % tall
    wide = min(4 if dim <= 96 else 2 if dim <= 192 else 1, 1 << (group.bit_length() - 1))
    ahead = min(BLOCK // PAGE_TOKENS, max(1, AHEAD_BYTES // page_bytes))

    signature = types.void(TABLE, RUNS, LENS, OWNED, SINKS, I64_1D, *([I64] * 11), types.float32)

    @nb.njit(signature, cache=True, nogil=True, fastmath=FLAGS, error_model="numpy")  # type: ignore[untyped-decorator]
    def decode(  # type: ignore[no-untyped-def]
        table, runs, lens, owned, sinks, rows, lane_lo, n, first, last,
        k_pages, v_pages, q, q_row, q_head, out, out_row, scale,
    ):  # fmt: skip
        qf = np.empty((group, dim), np.float32)
        acc = np.empty((group, dim), np.float32)
        s = np.empty((group, BLOCK), np.float32)
        order = np.empty(2 * BLOCK // PAGE_TOKENS + ahead, np.int64)
        asked = np.empty(2 * BLOCK // PAGE_TOKENS, np.int64)
        top = np.empty(group, np.float32)
        total = np.empty(group, np.float32)
        s_at, q_at, acc_at = s.ctypes.data, qf.ctypes.data, acc.ctypes.data
        for item in range(first, last):
            i, head = item // n, item % n
            row, lane = rows[i], lane_lo + head
            length = nb.int64(lens[row, lane]) if owned[row, lane] else 0
            after = min(item + 1, last - 1)
            next_row, next_lane = rows[after // n], lane_lo + after % n
            out_at = out + i * out_row + head * group * row_bytes
            for h in range(group):
                top[h], total[h] = LOWEST, 0
                if sinks.shape[0] > 0:
                    top[h], total[h] = sinks[head * group + h], 1
                load_row(
                    q_at + h * f_bytes,
                    q + i * q_row + (head * group + h) * q_head,
                    scale,
                    dim,
                    code,
                )
                for d in range(dim):
                    acc[h, d] = 0
            for start in range(0, length, BLOCK):
                count = min(length - start, BLOCK)
                pages = (count + PAGE_TOKENS - 1) // PAGE_TOKENS
                # Pages in the order of reading: keys, values, keys of the next block or item.
                first_page = start // PAGE_TOKENS
                beyond = min(ahead, (length + PAGE_TOKENS - 1) // PAGE_TOKENS - first_page - pages)
                run = table[row, lane, first_page // RUN_PAGES]
                for p in range(pages + beyond):
                    if p == RUN_PAGES:  # a block is a run, what is beyond it the next one
                        run = table[row, lane, first_page // RUN_PAGES + 1]
                    page = nb.int64(runs[run, p % RUN_PAGES]) * page_bytes
                    order[p if p < pages else p + pages] = k_pages + page
                    if p < pages:
                        order[pages + p] = v_pages + page
                run = table[next_row, next_lane, 0]
                for p in range(ahead - beyond):
                    page = nb.int64(runs[run, p]) * page_bytes
                    order[2 * pages + beyond + p] = k_pages + page
                # The CPU follows consecutive pages by itself, faster than one can ask for them:
                # there the page at hand stands for the later one.
                for p in range(2 * pages):
                    follows = order[p + ahead] == order[p + ahead - 1] + page_bytes
                    asked[p] = order[p] if follows else order[p + ahead]
                for p in range(pages):
                    at, later, s_p = order[p], asked[p], s_at + p * PAGE_TOKENS * 4
                    scores(q_at, at, s_p, BLOCK, later, tall, dim, code, 1)
                    for h in range(tall, group - rest, tall):
                        q_h, s_h = q_at + h * f_bytes, s_p + h * s_bytes
                        scores(q_h, at, s_h, BLOCK, later, tall, dim, code, 0)
                    if rest > 0:
                        q_h, s_h = q_at + (group - rest) * f_bytes, s_p + (group - rest) * s_bytes
                        scores(q_h, at, s_h, BLOCK, later, rest, dim, code, 0)
                padded = pages * PAGE_TOKENS
                for h in range(group):
                    for t in range(count, padded):
                        s[h, t] = LOWEST
                    highest = highest_of(s_at + h * s_bytes, padded, top[h])
                    if highest > top[h]:
                        fade = exp2(top[h] - highest)
                        top[h] = highest
                        total[h] *= fade
                        for d in range(dim):
                            acc[h, d] *= fade
                    part, check = np.float32(0), np.float32(0)
                    for t in range(padded):
                        check += s[h, t] * np.float32(0)  # NaN if a score is; max() hides it
                        e = exp2(s[h, t] - highest)
                        s[h, t] = e
                        part += e
                    total[h] += part + check
                for p in range(pages):
                    at, later = order[pages + p], asked[pages + p]
                    p_at = s_at + p * PAGE_TOKENS * 4
                    tokens = min(count - p * PAGE_TOKENS, PAGE_TOKENS)
                    accumulate(acc_at, p_at, BLOCK, at, tokens, later, wide, dim, code, 1)
                    h = wide
                    while h + wide <= group:
                        acc_h, p_h = acc_at + h * f_bytes, p_at + h * s_bytes
                        accumulate(acc_h, p_h, BLOCK, at, tokens, later, wide, dim, code, 0)
                        h += wide
                    if wide > 2 and group - h >= 2:
                        acc_h, p_h = acc_at + h * f_bytes, p_at + h * s_bytes
                        accumulate(acc_h, p_h, BLOCK, at, tokens, later, 2, dim, code, 0)
                        h += 2
                    if wide > 1 and h < group:
                        acc_h, p_h = acc_at + h * f_bytes, p_at + h * s_bytes
                        accumulate(acc_h, p_h, BLOCK, at, tokens, later, 1, dim, code, 0)
            for h in range(group):
                factor = np.float32(1) / total[h] if length > 0 else np.float32(0)
                store_row(out_at + h * row_bytes, acc_at + h * f_bytes, factor, dim, code)

    return decode  # type: ignore[no-any-return]

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
from typing import Any

import numba as nb
import numpy as np
from numba.core import types

from . import simd
from .numba_pages import I64, I64_1D, LENS, OWNED, TABLE
from .pages import PAGE_TOKENS

BLOCK = 256
"""Tokens whose scores are held at once; their float32 scores stay in the first-level cache."""

LOG2_E = math.log2(math.e)
LOWEST = np.float32(-1e30)  # "minus infinity" that fast-math may compute with
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
    fours, twos, row_bytes = group // 4 * 4, group // 2 * 2, dim * simd.ITEM_BYTES[code]
    page_bytes = PAGE_TOKENS * row_bytes
    step = 4 if group >= 4 else 8 if group >= 2 else 16  # tokens per tile of most heads
    step_bytes, s_bytes, f_bytes = step * row_bytes, BLOCK * 4, dim * 4

    signature = types.void(
        TABLE, LENS, OWNED, I64_1D, *([I64] * 11), types.float32
    )

    @nb.njit(signature, cache=True, nogil=True, fastmath=True)  # type: ignore[untyped-decorator]
    def decode(  # type: ignore[no-untyped-def]
        table, lens, owned, rows, lane_lo, n, first, last,
        k_pages, v_pages, q, q_row, q_head, out, out_row, scale,
    ):  # fmt: skip
        qf = np.empty((group, dim), np.float32)
        acc = np.empty((group, dim), np.float32)
        s = np.empty((group, BLOCK), np.float32)
        top = np.empty(group, np.float32)
        total = np.empty(group, np.float32)
        s_at, q_at, acc_at = s.ctypes.data, qf.ctypes.data, acc.ctypes.data
        for item in range(first, last):
            i, head = item // n, item % n
            row, lane = rows[i], lane_lo + head
            length = nb.int64(lens[row, lane]) if owned[row, lane] else 0
            out_at = out + i * out_row + head * group * row_bytes
            for h in range(group):
                top[h], total[h] = LOWEST, 0
                simd.load_row(
                    q_at + h * f_bytes, q + i * q_row + (head * group + h) * q_head, scale, dim, code
                )
                for d in range(dim):
                    acc[h, d] = 0
            for start in range(0, length, BLOCK):
                count = min(length - start, BLOCK)
                pages = (count + PAGE_TOKENS - 1) // PAGE_TOKENS
                base = start // PAGE_TOKENS
                for p in range(pages):
                    at = k_pages + nb.int64(table[row, lane, base + p]) * page_bytes
                    # The page after this one; after the last one, the first value page.
                    if p + 1 < pages:
                        ahead = k_pages + nb.int64(table[row, lane, base + p + 1]) * page_bytes
                    else:
                        ahead = v_pages + nb.int64(table[row, lane, base]) * page_bytes
                    s_p = s_at + p * PAGE_TOKENS * 4
                    for t in range(0, PAGE_TOKENS, step):
                        simd.prefetch(ahead + t * row_bytes, step_bytes)
                        k_t, s_t = at + t * row_bytes, s_p + t * 4
                        for h in range(0, fours, 4):
                            simd.scores(q_at + h * f_bytes, k_t, s_t + h * s_bytes, BLOCK, 4, dim, code)
                        if group & 2 and t % 8 == 0:
                            simd.scores(q_at + fours * f_bytes, k_t, s_t + fours * s_bytes, BLOCK, 2, dim, code)
                        if group & 1 and t == 0:
                            simd.scores(q_at + twos * f_bytes, k_t, s_t + twos * s_bytes, BLOCK, 1, dim, code)
                for h in range(group):
                    highest = top[h]
                    for t in range(count):
                        highest = max(highest, s[h, t])
                    if highest > top[h]:
                        fade = exp2(top[h] - highest)
                        top[h] = highest
                        total[h] *= fade
                        for d in range(dim):
                            acc[h, d] *= fade
                    part = np.float32(0)
                    for t in range(count):
                        e = exp2(s[h, t] - highest)
                        s[h, t] = e
                        part += e
                    total[h] += part
                for p in range(pages):
                    at = v_pages + nb.int64(table[row, lane, base + p]) * page_bytes
                    if p + 1 < pages:
                        ahead = v_pages + nb.int64(table[row, lane, base + p + 1]) * page_bytes
                        simd.prefetch(ahead, page_bytes)
                    elif start + BLOCK < length:
                        ahead = k_pages + nb.int64(table[row, lane, base + pages]) * page_bytes
                        simd.prefetch(ahead, page_bytes)
                    tokens = min(count - p * PAGE_TOKENS, PAGE_TOKENS)
                    s_p = s_at + p * PAGE_TOKENS * 4
                    for h in range(0, fours, 4):
                        simd.accumulate(acc_at + h * f_bytes, s_p + h * s_bytes, BLOCK, at, tokens, 4, dim, code)
                    if group & 2:
                        simd.accumulate(acc_at + fours * f_bytes, s_p + fours * s_bytes, BLOCK, at, tokens, 2, dim, code)
                    if group & 1:
                        simd.accumulate(acc_at + twos * f_bytes, s_p + twos * s_bytes, BLOCK, at, tokens, 1, dim, code)
            for h in range(group):
                factor = np.float32(1) / total[h] if length > 0 else np.float32(0)
                simd.store_row(out_at + h * row_bytes, acc_at + h * f_bytes, factor, dim, code)

    return decode  # type: ignore[no-any-return]

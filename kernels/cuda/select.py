# SPDX-License-Identifier: Apache-2.0
"""How many tokens each head keeps and which, for all prompts that end in a pass: two launches.

The same tokens as `budgets/selection.py`: higher score first, then lower head, then lower position;
NaN counts as minus infinity. The threshold is found by a radix select over the bits of the scores,
8 at a time, so nothing is sorted. One program works for one head (or for the heads that compete),
over the whole prompt. Checked with Triton's interpreter on CPU tensors; not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fairkv_sglang.kernels.prompts import BEYOND, COLUMN, FLOOR, LENGTH, SCORED, PromptBatch

SCORES = 2048
"""Scores that a program looks at together."""
_LENGTH, _SCORED, _COLUMN, _BEYOND, _FLOOR = (
    tl.constexpr(x) for x in (LENGTH, SCORED, COLUMN, BEYOND, FLOOR)
)


@triton.jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """float32 -> integers that order like it; NaN lowest, -0 as 0."""
    x = tl.where(x == x, x, float("-inf"))
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -bits - 1, bits + 2147483648)


@triton.jit
def _threshold(scores, m, need, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The need-th largest of m scores, and how many of those equal to it are to be taken."""
    digits = tl.arange(0, 256)
    prefix = (need * 0).to(tl.int64)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        found = tl.zeros((256,), tl.int32)
        for start in range(0, m, BLOCK):
            at = start + tl.arange(0, BLOCK)
            key = _ordered(tl.load(scores + at, mask=at < m, other=0.0))
            match = (at < m) & ((key >> (shift + 8)) == (prefix >> (shift + 8)))
            found += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=match)
        above = tl.sum(found, 0) - tl.cumsum(found, 0)
        hit = (above < need) & (above + found >= need)
        prefix += tl.sum(tl.where(hit, digits, 0), 0).to(tl.int64) << shift
        need -= tl.sum(tl.where(hit, above, 0), 0)
    return prefix, need


@triton.jit(do_not_specialize=["stride", "width", "counts_stride"])
def _share(  # type: ignore[no-untyped-def]
    scores, stride, table, width, counts, counts_stride, heads,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (group, prompt): Ada-KV's budgets of neighbouring heads; see `scopes/pooled.py`.

    A head keeps the scores above a threshold, or its floor if those are fewer. The threshold is the
    lowest at which the heads together keep what they have, found digit by digit.
    """
    first, p = tl.program_id(0) * heads, tl.program_id(1)
    length = tl.load(table + _LENGTH * width + p)
    m = tl.load(table + _SCORED * width + p).to(tl.int32)
    total = (heads * tl.load(table + _BEYOND * width + p)).to(tl.int32)
    floor = tl.load(table + _FLOOR * width + p).to(tl.int32)
    of_group = scores + first.to(tl.int64) * stride + tl.load(table + _COLUMN * width + p)
    h, digits = tl.arange(0, HEADS), tl.arange(0, 256)
    real = h < heads
    prefix = (total * 0).to(tl.int64)
    above, tied = tl.zeros((HEADS,), tl.int32), tl.zeros((HEADS,), tl.int32)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        found = tl.zeros((HEADS, 256), tl.int32)
        for r in range(heads):
            of_head = tl.zeros((256,), tl.int32)
            for start in range(0, m, BLOCK):
                at = start + tl.arange(0, BLOCK)
                key = _ordered(tl.load(of_group + r * stride + at, mask=at < m, other=0.0))
                match = (at < m) & ((key >> (shift + 8)) == (prefix >> (shift + 8)))
                of_head += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=match)
            found = tl.where(h[:, None] == r, of_head[None, :], found)
        higher = above[:, None] + tl.sum(found, 1)[:, None] - tl.cumsum(found, 1)
        kept = tl.where(real[:, None], tl.maximum(higher + found, floor), 0)
        # Fewer are kept at a higher digit; the highest at which they are enough.
        digit = tl.sum((tl.sum(kept, 0) >= total).to(tl.int32), 0) - 1
        prefix += digit.to(tl.int64) << shift
        above = tl.sum(tl.where(digits[None, :] == digit, higher, 0), 1)
        tied = tl.sum(tl.where(digits[None, :] == digit, found, 0), 1)
    sure = tl.where(real, tl.maximum(above, floor), 0)
    more = tl.where(real, tl.maximum(above + tied - sure, 0), 0)
    left = total - tl.sum(sure, 0) - (tl.cumsum(more, 0) - more)  # lower heads first
    caps = sure + tl.maximum(tl.minimum(left, more), 0)
    kept_of_head = tl.where(m > 0, length - m + caps, length)
    tl.store(counts + p * counts_stride + first + h, kept_of_head, mask=real)


@triton.jit(
    do_not_specialize=["stride", "width", "counts_stride", "out_prompt", "out_head", "most"]
)
def _pick(  # type: ignore[no-untyped-def]
    scores, stride, table, width, counts, counts_stride, out, out_prompt, out_head, most,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (head, prompt): ascending positions of the head's best tokens and of the window."""
    head, p = tl.program_id(0), tl.program_id(1)
    length = tl.load(table + _LENGTH * width + p).to(tl.int32)
    m = tl.load(table + _SCORED * width + p).to(tl.int32)
    count = tl.load(counts + p * counts_stride + head).to(tl.int32)
    keep = count - (length - m)
    row = scores + head.to(tl.int64) * stride + tl.load(table + _COLUMN * width + p)
    threshold, left = _threshold(row, m, keep, BLOCK)
    threshold = tl.where(keep > 0, threshold, 1 << 33)
    out += p.to(tl.int64) * out_prompt + head * out_head
    written, ties = 0, 0
    for start in range(0, m, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = _ordered(tl.load(row + at, mask=at < m, other=0.0))
        tied = (at < m) & (key == threshold)
        rank = ties + tl.cumsum(tied.to(tl.int32), 0)
        take = ((at < m) & (key > threshold)) | (tied & (rank <= left))
        to = written + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(out + to, at.to(tl.int64), mask=take)
        written += tl.sum(take.to(tl.int32), 0)
        ties += tl.sum(tied.to(tl.int32), 0)
    for start in range(0, length - m, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out + keep + at, (m + at).to(tl.int64), mask=at < length - m)
    for start in range(count, most, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out + at, tl.full((BLOCK,), -1, tl.int64), mask=at < most)


def shared_counts(scores: torch.Tensor, prompts: PromptBatch, group: int) -> torch.Tensor:
    """int64 [P, rows]: kept tokens where each `group` neighbouring heads compete.

    scores: float32 [rows, prompts.total].
    """
    rows = scores.shape[0]
    counts = torch.empty((prompts.count, rows), dtype=torch.int64, device=scores.device)
    _share[(rows // group, prompts.count)](
        scores, scores.stride(0), prompts.table, prompts.count + 1, counts, rows, group,
        HEADS=triton.next_power_of_2(group), BLOCK=SCORES,
    )  # fmt: skip
    return counts


def pick(
    scores: torch.Tensor, counts: torch.Tensor, prompts: PromptBatch, width: int
) -> torch.Tensor:
    """int64 [P, n, width]: ascending kept positions, then -1.

    scores: float32 [n, prompts.total]. counts: int64 [P, n], window included, at most `width`.
    """
    n = counts.shape[1]
    indices = torch.empty((prompts.count, n, width), dtype=torch.int64, device=counts.device)
    _pick[(n, prompts.count)](
        scores, scores.stride(0), prompts.table, prompts.count + 1, counts, counts.stride(0),
        indices, indices.stride(0), indices.stride(1), width, BLOCK=SCORES,
    )  # fmt: skip
    return indices

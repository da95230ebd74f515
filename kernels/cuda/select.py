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
def _threshold(scores, stride, rows, m, need, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The need-th largest entry of [rows, m], and how many entries equal to it are to be taken."""
    digits = tl.arange(0, 256)
    prefix = (need * 0).to(tl.int64)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        found = tl.zeros((256,), tl.int32)
        for r in range(rows):
            for start in range(0, m, BLOCK):
                at = start + tl.arange(0, BLOCK)
                key = _ordered(tl.load(scores + r * stride + at, mask=at < m, other=0.0))
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
    """Program (group, prompt): Ada-KV's budgets of neighbouring heads; see `scopes/pooled.py`."""
    first, p = tl.program_id(0) * heads, tl.program_id(1)
    length = tl.load(table + _LENGTH * width + p)
    m = tl.load(table + _SCORED * width + p).to(tl.int32)
    beyond, floor = tl.load(table + _BEYOND * width + p), tl.load(table + _FLOOR * width + p)
    h = tl.arange(0, HEADS)
    of_group = scores + first.to(tl.int64) * stride + tl.load(table + _COLUMN * width + p)
    total = heads * beyond
    threshold, left = _threshold(of_group, stride, heads, m, total.to(tl.int32), BLOCK)
    pooled = tl.zeros((HEADS,), tl.int64)
    for r in range(heads):
        above, tied = 0, 0
        for start in range(0, m, BLOCK):
            at = start + tl.arange(0, BLOCK)
            key = _ordered(tl.load(of_group + r * stride + at, mask=at < m, other=0.0))
            above += tl.sum(((at < m) & (key > threshold)).to(tl.int32), 0)
            tied += tl.sum(((at < m) & (key == threshold)).to(tl.int32), 0)
        taken = tl.minimum(left, tied)  # lower heads first
        left -= taken
        pooled = tl.where(h == r, (above + taken).to(tl.int64), pooled)
    # Rounded down; the missing tokens go to the largest remainders, lower heads first.
    beyond_or_1 = tl.maximum(beyond, 1)
    quota = tl.where(h < heads, pooled * (beyond - floor), 0)
    caps = tl.where(h < heads, floor + quota // beyond_or_1, 0)
    rest = tl.where(h < heads, quota % beyond_or_1, -1)
    before = (rest[None, :] > rest[:, None]) | (
        (rest[None, :] == rest[:, None]) & (h[None, :] < h[:, None])
    )
    caps += (tl.sum(before.to(tl.int64), 1) < total - tl.sum(caps, 0)).to(tl.int64)
    kept = tl.where(m > 0, length - m + caps, length)
    tl.store(counts + p * counts_stride + first + h, kept, mask=h < heads)


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
    threshold, left = _threshold(row, 0, 1, m, keep, BLOCK)
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

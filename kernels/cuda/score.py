# SPDX-License-Identifier: Apache-2.0
"""SnapKV's scores (arXiv 2404.14469) in Triton, of all prompts that end in a pass: four launches.

Keys are read from SGLang's pool through its request table, twice: the first pass gives every block
of keys its softmax statistics for each query row, which are joined into one log-sum-exp for each
row; the second computes the logits again and sums the weights over the window's rows. So nothing of
the size [window, prompt] and no copy of the keys is ever alive: beside the result there are
[heads, group, prompt] numbers, and as much again for statistics (at 128k tokens, 8 heads and group
4 about 16 MiB each). Checked with Triton's interpreter on CPU tensors; not yet run on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fairkv_sglang.kernels.prompts import BLOCK, COLUMN, KEYS, LENGTH, ROW, SCORED, PromptBatch

LOG2_E = math.log2(math.e)
_ROW, _LENGTH, _SCORED, _COLUMN, _BLOCK = (
    tl.constexpr(x) for x in (ROW, LENGTH, SCORED, COLUMN, BLOCK)
)


@triton.jit
def _prompt_of(table, width, at, PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """The prompt to which block `at` belongs; prompts without blocks share a start."""
    i = tl.arange(0, PAD)
    starts = tl.load(table + _BLOCK * width + i, mask=i < width - 1, other=2**62)
    return tl.sum((starts <= at).to(tl.int32), 0) - 1


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    q, keys, j, head, key_at, q_row, q_head, q_group, scale, total,
    W: tl.constexpr, W_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """[W_PAD, KEYS] of query head j in base 2; hidden positions and padding rows hold -1e30."""
    w, d = tl.arange(0, W_PAD), tl.arange(0, D_PAD)
    some = (w < W)[:, None] & (d < D)[None, :]
    queries = tl.load(
        q + w[:, None] * q_row + head * q_head + j * q_group + d[None, :], mask=some, other=0.0
    )
    s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    seen = (key_at[None, :] <= (total - W + w)[:, None]) & (w < W)[:, None]
    return tl.where(seen, s, -1e30)


@triton.jit
def _keys(  # type: ignore[no-untyped-def]
    k, slots, slots_row, table, width, p, head, key_at, total, k_slot, k_head,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, D_PAD)
    row = tl.load(table + _ROW * width + p)
    slot = tl.load(slots + row * slots_row + key_at, mask=key_at < total, other=0).to(tl.int64)
    some = (key_at < total)[:, None] & (d < D)[None, :]
    return tl.load(k + slot[:, None] * k_slot + head * k_head + d[None, :], mask=some, other=0.0)


@triton.jit(do_not_specialize=["width", "q_prompt"])
def _statistics(  # type: ignore[no-untyped-def]
    q, k, slots, slots_row, table, width, tops, sums, scale,
    q_prompt, q_row, q_head, q_group, k_slot, k_head, G,
    W: tl.constexpr, W_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    KEYS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Program (head, block): maximum and sum of 2^(logit - maximum) over its keys, for each row."""
    head, block = tl.program_id(0), tl.program_id(1)
    p = _prompt_of(table, width, block, PAD)
    total = tl.load(table + _LENGTH * width + p)
    key_at = (block - tl.load(table + _BLOCK * width + p)) * KEYS + tl.arange(0, KEYS)
    keys = _keys(
        k, slots, slots_row, table, width, p, head, key_at, total, k_slot, k_head, D, D_PAD
    )
    w = tl.arange(0, W_PAD)
    for j in range(0, G):
        s = _logits(
            q + p * q_prompt, keys, j, head, key_at, q_row, q_head, q_group, scale, total,
            W, W_PAD, D, D_PAD,
        )  # fmt: skip
        top = tl.max(s, 1)
        at = ((head.to(tl.int64) * tl.num_programs(1) + block) * G + j) * W_PAD + w
        tl.store(tops + at, top)
        tl.store(sums + at, tl.sum(tl.exp2(s - top[:, None]), 1))


@triton.jit(do_not_specialize=["width", "blocks"])
def _join(  # type: ignore[no-untyped-def]
    table, width, tops, sums, lse, blocks, G, W_PAD: tl.constexpr, STEP: tl.constexpr
):
    """Program (head, query head, prompt): log2 of the sum of 2^logit over all keys, per row."""
    head, j, p = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first = tl.load(table + _BLOCK * width + p)
    end = tl.load(table + _BLOCK * width + p + 1)
    w = tl.arange(0, W_PAD)
    highest = tl.full((W_PAD,), -1e30, tl.float32)
    weight = tl.zeros((W_PAD,), tl.float32)
    for start in range(first, end, STEP):
        b = start + tl.arange(0, STEP)
        at = (((head * blocks + b) * G + j) * W_PAD)[:, None] + w[None, :]
        top = tl.load(tops + at, mask=(b < end)[:, None], other=-1e30)
        part = tl.load(sums + at, mask=(b < end)[:, None], other=0.0)
        higher = tl.maximum(highest, tl.max(top, 0))
        weight = weight * tl.exp2(highest - higher)
        weight += tl.sum(part * tl.exp2(top - higher[None, :]), 0)
        highest = higher
    to = lse + ((p * tl.num_programs(0) + head) * G + j) * W_PAD + w
    tl.store(to, highest + tl.log2(weight), mask=w < tl.where(end > first, W_PAD, 0))


@triton.jit(do_not_specialize=["width", "q_prompt", "out_row"])
def _columns(  # type: ignore[no-untyped-def]
    q, k, slots, slots_row, table, width, lse, out, out_row, scale,
    q_prompt, q_row, q_head, q_group, k_slot, k_head, G,
    W: tl.constexpr, W_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    KEYS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Program (head, block): mean over the window's rows of the attention to its keys."""
    head, block = tl.program_id(0), tl.program_id(1)
    p = _prompt_of(table, width, block, PAD)
    total = tl.load(table + _LENGTH * width + p)
    scored = tl.load(table + _SCORED * width + p)
    key_at = (block - tl.load(table + _BLOCK * width + p)) * KEYS + tl.arange(0, KEYS)
    keys = _keys(
        k, slots, slots_row, table, width, p, head, key_at, total, k_slot, k_head, D, D_PAD
    )
    column = tl.load(table + _COLUMN * width + p) + key_at
    w = tl.arange(0, W_PAD)
    for j in range(0, G):
        s = _logits(
            q + p * q_prompt, keys, j, head, key_at, q_row, q_head, q_group, scale, total,
            W, W_PAD, D, D_PAD,
        )  # fmt: skip
        norm = tl.load(lse + ((p * tl.num_programs(0) + head) * G + j) * W_PAD + w)
        weights = tl.where((w < W)[:, None], tl.exp2(s - norm[:, None]), 0.0)
        to = out + (head * G + j).to(tl.int64) * out_row + column
        tl.store(to, tl.sum(weights, 0) / W, mask=key_at < scored)


@triton.jit(do_not_specialize=["width", "row"])
def _pool(  # type: ignore[no-untyped-def]
    attention, table, width, out, row, G,
    WIDTH: tl.constexpr, LARGEST: tl.constexpr, KEYS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Program (head, block): pool over neighbours of the same prompt, mean over the group."""
    head, block = tl.program_id(0), tl.program_id(1)
    p = _prompt_of(table, width, block, PAD)
    scored = tl.load(table + _SCORED * width + p)
    key_at = (block - tl.load(table + _BLOCK * width + p)) * KEYS + tl.arange(0, KEYS)
    first = tl.load(table + _COLUMN * width + p)
    result = tl.zeros((KEYS,), tl.float32)
    for j in range(0, G):
        of_head = attention + (head * G + j).to(tl.int64) * row + first
        pooled = tl.zeros((KEYS,), tl.float32)  # attention is not negative
        for shift in range(WIDTH):
            at = key_at + shift - WIDTH // 2
            x = tl.load(of_head + at, mask=(at >= 0) & (at < scored), other=0.0)
            pooled = tl.maximum(pooled, x) if LARGEST else pooled + x
        result += pooled if LARGEST else pooled / WIDTH
    to = out + head.to(tl.int64) * row + first + key_at
    tl.store(to, result / G, mask=key_at < scored)


def snapkv_scores(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    prompts: PromptBatch,
    scale: float,
    kernel: int,
    pooling: str,
) -> torch.Tensor:
    """Scores of the tokens before the window of all prompts, one after the other.

    Args:
        q: [P, W, n, g, D] queries of the last W tokens of each prompt that is scored.
        k_pool: [slots, n, D]; any strides but the last, which is 1.
        prompts: What is scored.
        scale, kernel, pooling: see `Kernels.snapkv_score`.

    Returns:
        float32 [n, prompts.total]
    """
    count, rows, n, group, dim = q.shape
    scores = torch.empty((n, prompts.total), dtype=torch.float32, device=q.device)
    if not prompts.total:
        return scores
    if q.stride(4) != 1 or k_pool.stride(2) != 1 or prompts.slots.stride(1) != 1:
        raise ValueError("snapkv_scores: q, k and slots must be contiguous in their last dimension")
    attention = torch.empty((n, group, prompts.total), dtype=torch.float32, device=q.device)
    blocks, padded = prompts.blocks, max(16, triton.next_power_of_2(rows))
    stats = torch.empty((2, n, blocks, group, padded), dtype=torch.float32, device=q.device)
    lse = torch.empty((count, n, group, padded), dtype=torch.float32, device=q.device)
    table = (prompts.table, prompts.count + 1)
    source = (q, k_pool, prompts.slots, prompts.slots.stride(0), *table)
    strides = (*q.stride()[:4], *k_pool.stride()[:2], group)
    pad = max(32, triton.next_power_of_2(prompts.count))  # few variants to compile
    sizes = dict(
        W=rows, W_PAD=padded, D=dim, D_PAD=max(16, triton.next_power_of_2(dim)), KEYS=KEYS, PAD=pad
    )
    base2 = scale * LOG2_E
    _statistics[(n, blocks)](*source, stats[0], stats[1], base2, *strides, **sizes)
    _join[(n, group, count)](*table, stats[0], stats[1], lse, blocks, group, W_PAD=padded, STEP=16)
    _columns[(n, blocks)](*source, lse, attention, prompts.total, base2, *strides, **sizes)
    _pool[(n, blocks)](
        attention, *table, scores, prompts.total, group,
        WIDTH=kernel, LARGEST=pooling == "max", KEYS=KEYS, PAD=pad,
    )  # fmt: skip
    return scores


def snapkv_score(
    q: torch.Tensor, k: torch.Tensor, scale: float, kernel: int = 7, pooling: str = "max"
) -> torch.Tensor:
    """`Kernels.snapkv_score`: one prompt whose keys lie in order."""
    total = k.shape[0]
    slots = torch.arange(total, device=k.device)[None]
    prompts = PromptBatch.create([0], [total], [max(total - q.shape[0], 0)], slots)
    return snapkv_scores(q[None], k, prompts, scale, kernel, pooling)

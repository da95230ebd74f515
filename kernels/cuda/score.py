# SPDX-License-Identifier: Apache-2.0
"""SnapKV's scores (arXiv 2404.14469) in Triton, without the [window, prompt] attention matrix.

Two passes over the keys. The first gives every block of keys its softmax statistics for each query
row; they are joined into one log-sum-exp for each row. The second computes the logits again and
sums the weights over the window's rows, so only [heads, group, prompt] numbers are written.
Checked with Triton's interpreter on CPU tensors; not yet run on a GPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

LOG2_E = math.log2(math.e)
KEYS = 64
"""Keys for each program."""


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
    k, head, key_at, k_row, k_head, total, D: tl.constexpr, D_PAD: tl.constexpr
):
    d = tl.arange(0, D_PAD)
    some = (key_at < total)[:, None] & (d < D)[None, :]
    where = key_at.to(tl.int64)[:, None] * k_row + head * k_head + d[None, :]
    return tl.load(k + where, mask=some, other=0.0)


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    q, k, tops, sums, scale, total, q_row, q_head, q_group, k_row, k_head, G,
    W: tl.constexpr, W_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Program (head, block): maximum and sum of 2^(logit - maximum) over its keys, for each row."""
    head, block = tl.program_id(0), tl.program_id(1)
    key_at = block * KEYS + tl.arange(0, KEYS)
    keys = _keys(k, head, key_at, k_row, k_head, total, D, D_PAD)
    w = tl.arange(0, W_PAD)
    for j in range(0, G):
        s = _logits(
            q, keys, j, head, key_at, q_row, q_head, q_group, scale, total, W, W_PAD, D, D_PAD
        )
        top = tl.max(s, 1)
        at = ((head * tl.num_programs(1) + block) * G + j) * W_PAD + w
        tl.store(tops + at, top)
        tl.store(sums + at, tl.sum(tl.exp2(s - top[:, None]), 1))


@triton.jit
def _columns(  # type: ignore[no-untyped-def]
    q, k, lse, out, scale, total, scored, q_row, q_head, q_group, k_row, k_head, G,
    W: tl.constexpr, W_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Program (head, block): mean over the window's rows of the attention to its keys."""
    head, block = tl.program_id(0), tl.program_id(1)
    key_at = block * KEYS + tl.arange(0, KEYS)
    keys = _keys(k, head, key_at, k_row, k_head, total, D, D_PAD)
    w = tl.arange(0, W_PAD)
    for j in range(0, G):
        s = _logits(
            q, keys, j, head, key_at, q_row, q_head, q_group, scale, total, W, W_PAD, D, D_PAD
        )
        norm = tl.load(lse + (head * G + j) * W_PAD + w)
        p = tl.where((w < W)[:, None], tl.exp2(s - norm[:, None]), 0.0)
        to = out + (head * G + j).to(tl.int64) * scored + key_at
        tl.store(to, tl.sum(p, 0) / W, mask=key_at < scored)


def snapkv_score(
    q: torch.Tensor, k: torch.Tensor, scale: float, kernel: int = 7, pooling: str = "max"
) -> torch.Tensor:
    """`Kernels.snapkv_score` on CUDA tensors; any strides with a contiguous last dimension."""
    rows, n, group, dim = q.shape
    total = k.shape[0]
    scored = max(total - rows, 0)
    attention = torch.empty((n, group, scored), dtype=torch.float32, device=q.device)
    if not scored:
        return attention.mean(1)
    if q.stride(3) != 1 or k.stride(2) != 1:
        raise ValueError("snapkv_score: q and k must be contiguous in their last dimension")
    blocks, padded = triton.cdiv(total, KEYS), max(16, triton.next_power_of_2(rows))
    stats = torch.empty((2, n, blocks, group, padded), dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:2], group)
    sizes = dict(W=rows, W_PAD=padded, D=dim, D_PAD=max(16, triton.next_power_of_2(dim)), KEYS=KEYS)
    grid, base2 = (n, blocks), scale * LOG2_E
    _statistics[grid](q, k, stats[0], stats[1], base2, total, *strides, **sizes)
    top = stats[0].amax(1, keepdim=True)
    lse = (top + (stats[1] * torch.exp2(stats[0] - top)).sum(1, keepdim=True).log2()).squeeze(1)
    _columns[grid](q, k, lse.contiguous(), attention, base2, total, scored, *strides, **sizes)
    if kernel > 1:
        pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
        attention = pool(attention, kernel, stride=1, padding=kernel // 2)
    return attention.mean(1)

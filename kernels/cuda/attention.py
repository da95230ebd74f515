# SPDX-License-Identifier: Apache-2.0
"""Decode attention over head pages in Triton: needs no plan and no workspace.

The fallback where FlashInfer is not installed, and a second opinion in checks. One program serves
one (request, head), so a batch of few long rows does not fill a GPU; `flashinfer` splits
rows. Checked with Triton's interpreter on CPU tensors; not yet run on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fairkv_sglang.kernels.layout import PAGE_TOKENS, RUN_PAGES, PageTensors

from .lookup import page_of

LOG2_E = math.log2(math.e)


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    q, out, k_pages, v_pages, table, runs, lens, owned, rows, sinks, scale,
    lane_lo, lanes, max_runs, q_row, q_head, o_row, o_head,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PAGE: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, SINKS: tl.constexpr,
    LOG2E: tl.constexpr,
):  # fmt: skip
    i, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows + i)
    cell = row * lanes + lane_lo + head
    length = tl.load(lens + cell)
    if tl.load(owned + cell) == 0:
        length = length * 0
    g, d, t = tl.arange(0, G_PAD), tl.arange(0, D_PAD), tl.arange(0, BLOCK)
    some_q = (g < G)[:, None] & (d < D)[None, :]
    queries = tl.load(
        q + i * q_row + (head * G + g)[:, None] * q_head + d[None, :], mask=some_q, other=0.0
    )
    top = tl.full((G_PAD,), -1e30, tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    if SINKS:  # each stands beside the logits and has no value
        top = tl.load(sinks + head * G + g, mask=g < G, other=0.0).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros((G_PAD, D_PAD), tl.float32)
    for start in range(0, length, BLOCK):
        at = start + t
        live = at < length
        page = page_of(table, runs, cell, at // PAGE, max_runs, live, RUN)
        where = (page * PAGE + at % PAGE)[:, None] * D + d[None, :]
        some = live[:, None] & (d < D)[None, :]
        k = tl.load(k_pages + where, mask=some, other=0.0)
        s = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(live[None, :], s, -1e30)
        highest = tl.maximum(top, tl.max(s, 1))
        fade = tl.exp2(top - highest)
        p = tl.exp2(s - highest[:, None])
        v = tl.load(v_pages + where, mask=some, other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        top = highest
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        out + i * o_row + (head * G + g)[:, None] * o_head + d[None, :],
        result.to(out.dtype.element_ty), mask=some_q,
    )  # fmt: skip


def decode(
    pages: PageTensors,
    q: torch.Tensor,
    rows: torch.Tensor,
    lane_lo: int,
    n: int,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> None:
    """`Kernels.decode` on CUDA tensors. Makes no tensor and does not wait for the device."""
    if n < 1 or q.shape[1] % n or not 0 <= lane_lo <= pages.lanes - n:
        last = lane_lo + n - 1
        raise ValueError(
            f"decode: {q.shape[1]} query heads over lanes {lane_lo}..{last} of {pages.lanes}"
        )
    if rows.shape[0] == 0:
        return
    if q.stride(2) != 1 or out.stride(2) != 1 or rows.stride(0) != 1:
        raise ValueError("decode: q, rows and out must be contiguous in their last dimension")
    group, dim = q.shape[1] // n, pages.head_dim
    _decode[(rows.shape[0], n)](
        q, out, pages.k_pages, pages.v_pages, pages.page_table, pages.runs, pages.lens, pages.owned,
        rows, rows if sinks is None else sinks, scale * LOG2_E,
        lane_lo, pages.lanes, pages.max_runs,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        G=group, G_PAD=max(16, triton.next_power_of_2(group)), D=dim,
        D_PAD=max(16, triton.next_power_of_2(dim)), PAGE=PAGE_TOKENS, RUN=RUN_PAGES, BLOCK=64,
        SINKS=sinks is not None, LOG2E=LOG2_E,
    )  # fmt: skip

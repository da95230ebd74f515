# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's tile lists for folded decode, made on the device for all layers in three launches.

Every (request, head) of a layer is a *row* of one query token. FlashInfer's FA2 paged kernel wants
the rows cut into *tiles* of at most `chunk` tokens and plans that on the host, per layer and step.
Here the same arrays are written by Triton kernels of fixed shape, without a host synchronisation,
so a decode step with its plan fits in one CUDA graph. UNTESTED ON A GPU; checked with Triton's
interpreter.

For layer l with rows r of lens[l, r] tokens, pages of P tokens and S spare tiles:

    chunk = max(CHUNK, roundup(ceil(sum_r lens / S), CHUNK))      tokens per tile, so that tiles fit
    tiles = ceil(lens / chunk)                                    0 for a row that is not served
    o_indptr = [0, cumsum tiles]

sum ceil(len / chunk) <= sum len / chunk + rows <= S + rows, so `rows + S` tiles always suffice.
Arrays equal those of FlashInfer's own `PrefillSplitQOKVIndptr` with `fixed_split_size = chunk / P`
(include/flashinfer/attention/scheduler.cuh, 0.6.18), but for empty rows, which FlashInfer gives one
tile and we none: the merge kernel then writes exact zeros. Tiles may stand in any order. Longest
first keeps the last wave of blocks short: whole tiles come first, then the rests of rows, sorted
into BUCKETS by length (in any order within one).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fairkv_sglang.kernels.layout import PAGE_TOKENS, RUN_PAGES, PageTensors

from .lookup import page_of
from .workspace import Workspace

CHUNK = 128
"""Smallest tile in tokens, and the unit of larger ones: what the FA2 kernel reads per iteration."""
BUCKETS = 64
"""Lengths of rests that are told apart, and one more for rows without a rest."""
ROWS = 1024
"""Rows that a block looks at together."""


@triton.jit
def _lengths(  # type: ignore[no-untyped-def]
    lens, owned, rows, rows_stride, r, live, heads, first, lanes
):
    """Tokens of the rows r of a layer: row i * heads + h is request i and lane first + h."""
    row = tl.load(rows + (r // heads) * rows_stride, mask=live, other=0)
    cell = row * lanes + first + r % heads
    mine = live & (tl.load(owned + cell, mask=live, other=0) != 0)
    return tl.load(lens + cell, mask=mine, other=0), cell


@triton.jit(do_not_specialize=["bs"])
def _lay_out(  # type: ignore[no-untyped-def]
    lens, owned, rows, rows_stride, lane_start, lanes, bs, spare,
    o_indptr, chunk_to, rows_to, layer_stride, last_page, full_starts, page_starts, width,
    next_place, layer_pages,
    PAGE: tl.constexpr, CHUNK: tl.constexpr, BUCKETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each layer: chunk, and where the tiles, pages and whole tiles of rows start.

    next_place [L, BUCKETS]: where the tile list has room for the rests of each bucket.
    """
    layer = tl.program_id(0)
    first = tl.load(lane_start + layer)
    heads = tl.load(lane_start + layer + 1) - first
    count = bs * heads
    total = tl.zeros((), tl.int64)
    for start in range(0, count, BLOCK):
        r = start + tl.arange(0, BLOCK)
        n, _ = _lengths(lens, owned, rows, rows_stride, r, r < count, heads, first, lanes)
        total += tl.sum(n.to(tl.int64), 0)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(total, spare), CHUNK) * CHUNK, CHUNK).to(tl.int32)
    tl.store(chunk_to + layer * layer_stride, chunk)
    tl.store(rows_to + layer * layer_stride, count)
    tiles, pages, whole = 0, 0, 0
    rests = tl.zeros((BUCKETS,), tl.int32)
    for start in range(0, count, BLOCK):
        r = start + tl.arange(0, BLOCK)
        live = r < count
        n, _ = _lengths(lens, owned, rows, rows_stride, r, live, heads, first, lanes)
        n_pages, n_whole, rest = tl.cdiv(n, PAGE), n // chunk, n % chunk
        n_tiles = n_whole + (rest > 0).to(tl.int32)
        at = layer * (width + 1) + r
        tl.store(
            o_indptr + layer * layer_stride + r, tiles + tl.cumsum(n_tiles, 0) - n_tiles, mask=live
        )
        tl.store(page_starts + at, pages + tl.cumsum(n_pages, 0) - n_pages, mask=live)
        tl.store(full_starts + at, whole + tl.cumsum(n_whole, 0) - n_whole, mask=live)
        of_last = tl.where(n > 0, n - (n_pages - 1) * PAGE, 0)
        tl.store(last_page + layer * width + r, of_last, mask=live)
        bucket = tl.where(rest > 0, (chunk - rest) * (BUCKETS - 1) // chunk, BUCKETS - 1)
        rests += tl.histogram(bucket, BUCKETS)
        tiles += tl.sum(n_tiles, 0)
        pages += tl.sum(n_pages, 0)
        whole += tl.sum(n_whole, 0)
    tl.store(o_indptr + layer * layer_stride + count, tiles)
    tl.store(page_starts + layer * (width + 1) + count, pages)
    tl.store(full_starts + layer * (width + 1) + count, whole)
    tl.store(layer_pages + layer, pages)
    places = whole + tl.cumsum(rests, 0) - rests
    tl.store(next_place + layer * BUCKETS + tl.arange(0, BUCKETS), places)


@triton.jit(do_not_specialize=["bs"])
def _list_tiles(  # type: ignore[no-untyped-def]
    lens, owned, rows, rows_stride, lane_start, lanes, bs, spare,
    request, kv_tile, valid, o_indptr, chunk_of, layer_stride, full_starts, width, next_place,
    SORTED: tl.constexpr, BUCKETS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, l) fills places b * BLOCK.. of a layer, and places the rests of as many rows."""
    layer = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(lane_start + layer)
    heads = tl.load(lane_start + layer + 1) - first
    count = bs * heads
    request += layer * layer_stride
    kv_tile += layer * layer_stride
    o_indptr += layer * layer_stride
    total = tl.load(o_indptr + count)
    if SORTED:
        starts = full_starts + layer * (width + 1)
        chunk = tl.load(chunk_of + layer * layer_stride)
        live = at < count
        n, _ = _lengths(lens, owned, rows, rows_stride, at, live, heads, first, lanes)
        rest = n % chunk
        has = live & (rest > 0)
        bucket = (chunk - rest) * (BUCKETS - 1) // chunk
        place = tl.atomic_add(next_place + layer * BUCKETS + bucket, 1, mask=has)
        tl.store(request + place, at, mask=has)
        tl.store(kv_tile + place, n // chunk, mask=has)
    else:
        starts = o_indptr
    listed = at < tl.load(starts + count)
    # The last row that starts at or before the place; rows without tiles share a start.
    low, high = tl.zeros_like(at), tl.zeros_like(at) + count
    for _ in range(BITS):
        middle = (low + high) // 2
        below = tl.load(starts + middle, mask=listed, other=0) <= at
        low, high = tl.where(below, middle, low), tl.where(below, high, middle)
    tl.store(request + at, low, mask=listed)
    tl.store(kv_tile + at, at - tl.load(starts + low, mask=listed, other=0), mask=listed)
    places = count + spare
    unused = (at >= total) & (at < places)
    tl.store(request + at, 0, mask=unused)
    tl.store(kv_tile + at, 0, mask=unused)
    tl.store(valid + layer * layer_stride * 4 + at, (at < total).to(tl.uint8), mask=at < places)


@triton.jit(do_not_specialize=["bs"])
def _list_pages(  # type: ignore[no-untyped-def]
    table, runs, rows, rows_stride, lane_start, lanes, max_runs, bs, layers,
    page_starts, layer_pages, kv_indptr, kv_indices, width,
    LAYERS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Program (b, l) copies the page ids of BLOCK rows into the list for all layers."""
    layer = tl.program_id(1)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(lane_start + layer)
    heads = tl.load(lane_start + layer + 1) - first
    count = bs * heads
    before = tl.arange(0, LAYERS)
    base = tl.sum(tl.load(layer_pages + before, mask=before < layer, other=0), 0)
    at = layer * (width + 1) + r
    start = tl.load(page_starts + at, mask=r <= count, other=0)
    tl.store(kv_indptr + at, base + start, mask=r <= count)
    live = r < count
    held = tl.load(page_starts + at + 1, mask=live, other=0) - tl.where(live, start, 0)
    row = tl.load(rows + (r // heads) * rows_stride, mask=live, other=0)
    cell = row * lanes + first + r % heads
    for done in range(0, tl.max(held, 0), WIDE):
        p = done + tl.arange(0, WIDE)
        some = p[None, :] < held[:, None]
        page = page_of(table, runs, cell[:, None], p[None, :], max_runs, some, RUN)
        tl.store(kv_indices + (base + start)[:, None] + p[None, :], page.to(tl.int32), mask=some)


def make_tiles(
    pages: PageTensors,
    rows: torch.Tensor,
    workspace: Workspace,
    longest_first: bool = True,
) -> None:
    """Plan of all layers for request rows int64 [bs], into the buffers of `workspace`.

    longest_first: order of the tiles; False is FlashInfer's.
    """
    to, bs = workspace, rows.shape[0]
    width, most = bs * to.most_heads, bs * to.most_heads + to.spare
    batch = (
        pages.lens, pages.owned, rows, rows.stride(0), to.lane_start, pages.lanes, bs, to.spare
    )  # fmt: skip
    _lay_out[(to.layers,)](
        *batch, to.o_indptr, to.chunk, to.total_rows, to.stride // 4, to.last_page_len,
        to.full_starts, to.page_starts, to.width, to.next_place, to.layer_pages,
        PAGE=PAGE_TOKENS, CHUNK=CHUNK, BUCKETS=BUCKETS, BLOCK=ROWS,
    )  # fmt: skip
    _list_tiles[(triton.cdiv(most, 256), to.layers)](
        *batch, to.request, to.kv_tile, to.valid, to.o_indptr, to.chunk, to.stride // 4,
        to.full_starts, to.width, to.next_place,
        SORTED=longest_first, BUCKETS=BUCKETS, BITS=to.width.bit_length(), BLOCK=256,
    )  # fmt: skip
    _list_pages[(triton.cdiv(width + 1, 16), to.layers)](
        pages.page_table, pages.runs, rows, rows.stride(0), to.lane_start, pages.lanes,
        pages.max_runs, bs, to.layers, to.page_starts, to.layer_pages, to.kv_indptr,
        to.kv_indices, to.width,
        LAYERS=triton.next_power_of_2(to.layers), BLOCK=16, WIDE=64, RUN=RUN_PAGES,
    )  # fmt: skip

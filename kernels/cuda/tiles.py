# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's work list for folded decode, computed on the device for all layers at once.

Every (request, head) of a layer is a *row* of one query token. FlashInfer's FA2 paged kernel wants
the rows cut into tiles of at most `chunk` tokens, and it plans that on the host, per layer and
step. Here the same arrays come from a few tensor operations of fixed shape, without a host
synchronisation, so a decode step with its plan fits in one CUDA graph.

For layer l with rows r of lens[l, r] tokens, pages of P tokens and S spare tiles:

    pages = ceil(lens / P)
    chunk = max(CHUNK, roundup(ceil(sum_r lens / S), CHUNK))      tokens per tile, so that tiles fit
    tiles = ceil(pages / (chunk / P))                             0 for a row that is not served
    o_indptr = [0, cumsum tiles]
    row of tile j = searchsorted(o_indptr[1:], j, side=right); tile number = j - o_indptr[row]

sum ceil(len / chunk) <= sum len / chunk + rows <= S + rows, so `rows + S` tiles always suffice.
Arrays equal those of FlashInfer's own `PrefillSplitQOKVIndptr` with `fixed_split_size = chunk / P`
(include/flashinfer/attention/scheduler.cuh, 0.6.18), but for empty rows, which FlashInfer gives one
tile and we none: the merge kernel then writes exact zeros. Tiles may stand in any order; longest
first keeps the last wave of blocks short.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from fairkv_sglang.kernels.pages import PAGE_TOKENS

CHUNK = 128
"""Smallest tile in tokens, and the unit of larger ones: what the FA2 kernel reads per iteration."""


@dataclass(frozen=True)
class Tiles:
    """Plan of L layers of up to B rows in up to G tiles; int32 unless noted."""

    pages: torch.Tensor  # [L, B]
    last_page_len: torch.Tensor  # [L, B], 0 for an empty row
    chunk: torch.Tensor  # [L, 1] tokens
    o_indptr: torch.Tensor  # [L, B + 1], also the merge kernel's indptr
    request: torch.Tensor  # [L, G] row of the tile
    kv_tile: torch.Tensor  # [L, G] number of the tile within its row
    valid: torch.Tensor  # [L, G] bool


def plan_tiles(lens: torch.Tensor, spare: int, longest_first: bool = True) -> Tiles:
    """Cut the rows of every layer into tiles.

    Args:
        lens: integer [L, B], tokens of each row; 0 = empty, not served here, or padding.
        spare: S, tiles beyond one for each row; two per multiprocessor is what FlashInfer takes.
        longest_first: order of the tiles; False is FlashInfer's.
    """
    if spare < 1:
        raise ValueError(f"plan: spare tiles must be at least 1, got {spare}")
    layers, rows = lens.shape
    lens = lens.to(torch.int64)
    total = lens.sum(1, keepdim=True)
    pages = (lens + (PAGE_TOKENS - 1)) // PAGE_TOKENS
    chunk = ((total + (spare - 1)) // spare + (CHUNK - 1)) // CHUNK * CHUNK
    chunk = chunk.clamp(min=CHUNK)
    per_tile = chunk // PAGE_TOKENS
    ends = ((pages + per_tile - 1) // per_tile).cumsum(1)
    o_indptr = torch.cat([torch.zeros_like(total), ends], 1)
    tile = torch.arange(rows + spare, device=lens.device).expand(layers, -1).contiguous()
    valid = tile < ends[:, -1:]
    # side=right passes over rows without tiles.
    request = torch.searchsorted(ends, tile, right=True).masked_fill(~valid, 0)
    kv_tile = (tile - o_indptr.gather(1, request)).masked_fill(~valid, 0)
    if longest_first:
        length = torch.minimum(chunk, lens.gather(1, request) - kv_tile * chunk)
        order = length.masked_fill(~valid, -1).sort(dim=1, descending=True, stable=True).indices
        request, kv_tile, valid = (x.gather(1, order) for x in (request, kv_tile, valid))
    last = torch.where(pages > 0, lens - (pages - 1) * PAGE_TOKENS, 0)
    return Tiles(
        pages=pages.int(),
        last_page_len=last.int(),
        chunk=chunk.int(),
        o_indptr=o_indptr.int(),
        request=request.int(),
        kv_tile=kv_tile.int(),
        valid=valid,
    )


@dataclass(frozen=True)
class Fold:
    """Which cell of [bs, lanes] each row of each layer is, for uneven numbers of heads.

    Row i * n + h of layer l, which has n heads, is request i and lane lane_start[l] + h: the order
    of ``q[bs, n * g, D].view(bs * n, g, D)``. Layers with fewer heads end in empty rows.
    """

    cell: torch.Tensor  # int64 [L, B], request * lanes + lane; 0 where not live
    live: torch.Tensor  # bool [L, B]
    rows: tuple[int, ...]  # rows of each layer, bs * heads

    @classmethod
    def create(cls, bs: int, lane_start: list[int], device: torch.device | str) -> Fold:
        """lane_start: L + 1 ascending lane numbers; layer l has lanes lane_start[l : l + 2]."""
        lanes = lane_start[-1]
        heads = [b - a for a, b in itertools.pairwise(lane_start)]
        if bs < 1 or not heads or min(heads) < 1 or lane_start[0] != 0:
            raise ValueError(
                f"plan: need requests and at least one head in every layer, got {bs} requests and "
                f"lane_start {lane_start}"
            )
        width = bs * max(heads)
        cell = torch.zeros((len(heads), width), dtype=torch.int64)
        live = torch.zeros((len(heads), width), dtype=torch.bool)
        for layer, n in enumerate(heads):
            request = torch.arange(bs)[:, None] * lanes
            lane = lane_start[layer] + torch.arange(n)[None, :]
            cell[layer, : bs * n] = (request + lane).view(-1)
            live[layer, : bs * n] = True
        return cls(cell.to(device), live.to(device), tuple(bs * n for n in heads))

    def lens(self, lens: torch.Tensor, owned: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """int32 [L, B] tokens of every row, from HeadPages' tables and the batch's rows [bs]."""
        served = lens[rows] * (owned[rows] != 0)
        return served.view(-1)[self.cell] * self.live


def csr_starts(pages: torch.Tensor) -> torch.Tensor:
    """int32 [L, B + 1]: where each row's page list starts in one list for all layers, in order."""
    layers, rows = pages.shape
    ends = pages.to(torch.int64).view(-1).cumsum(0).view(layers, rows)
    first = ends[:, :1] - pages[:, :1]
    return torch.cat([first, ends], 1).int()

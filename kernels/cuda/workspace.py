# SPDX-License-Identifier: Apache-2.0
"""Buffers of FlashInfer's plan, laid out for the largest batch; every batch up to it is exact.

FlashInfer's kernel gets a layer's plan as 15 numbers, most of them byte offsets into one buffer.
The numbers depend on the batch size, the buffer does not: a CUDA graph of any captured size and any
eager batch use the same memory, without padding, because one plan is live at a time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch

PLAN_FIELDS = 15


def tile_rows(group: int) -> int:
    """cta_tile_q for one query token of `group` heads."""
    if not 1 <= group <= 64:
        raise ValueError(f"FlashInfer decode: group must be 1 to 64 query heads, got {group}")
    return 16 if group <= 16 else 64


def own_plan_bytes(rows: int, group: int, head_dim: int, processors: int) -> int:
    """Float workspace that FlashInfer's *own* plan needs for `rows` folded rows.

    PrefillPlan (scheduler.cuh, 0.6.18) reserves a float32 tile of partial outputs and its
    log-sum-exps for each query head and each of its `padded` tiles, although folded decode uses one
    row of a tile. Our plan needs :meth:`Workspace.float_bytes` instead.
    """
    tile = tile_rows(group)
    padded = max(2 * processors, -(-rows * group // tile) + rows - 1)
    return group * padded * tile * (head_dim + 1) * 4 + (1 << 20)


def read_array(buffer: torch.Tensor, info: Sequence[int], field: int, length: int) -> list[int]:
    """int32 array of a plan in its buffer, as FlashInfer's kernel finds it."""
    part = buffer[info[field] : info[field] + 4 * length]
    return part.clone().view(torch.int32).tolist()  # type: ignore[no-any-return]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


class Workspace:
    """Plan of all layers, for batches of up to `max_batch`.

    Args:
        max_batch: requests of the largest batch.
        lane_start: L + 1 ascending lane numbers; layer l has lanes lane_start[l : l + 2].
        spare: tiles beyond one for each row.
        group: query heads per KV head.
        head_dim: D.
        out_bytes: bytes of an element of the output.
        num_pages: pages of the arena, of which any number may be listed.
        buckets: see `tiles`.
    """

    def __init__(
        self,
        max_batch: int,
        lane_start: Sequence[int],
        spare: int,
        group: int,
        head_dim: int,
        out_bytes: int,
        num_pages: int,
        buckets: int,
        device: torch.device | str,
    ) -> None:
        heads = [b - a for a, b in itertools.pairwise(lane_start)]
        if max_batch < 1 or spare < 1 or not heads or min(heads) < 1 or lane_start[0] != 0:
            raise ValueError(
                "FlashInfer decode: needs requests, a spare tile and at least one head in every "
                f"layer, got {max_batch} requests, {spare} tiles and lane_start {list(lane_start)}"
            )
        self.max_batch, self.heads, self.spare = max_batch, heads, spare
        self.group, self.head_dim, self.out_bytes = group, head_dim, out_bytes
        self.layers, self.most_heads = len(heads), max(heads)
        self.width = max_batch * self.most_heads
        tiles = self.width + spare
        sizes = {
            "request": 4 * tiles,
            "qo_tile": 4 * tiles,  # stays 0: one query tile per row
            "kv_tile": 4 * tiles,
            "o_indptr": 4 * (self.width + 1),
            "chunk": 4,
            "total_rows": 4,
            "valid": tiles,
        }
        self.offsets: dict[str, int] = {}
        self.stride = 0  # bytes of a layer
        for name, nbytes in sizes.items():
            self.offsets[name] = self.stride
            self.stride += _aligned(nbytes)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.buffer = zeros(self.layers * self.stride, dtype=torch.uint8)
        words = self.buffer.view(torch.int32)
        # Each begins where the array of layer 0 does; layers are `stride` bytes apart.
        self.request, self.kv_tile, self.o_indptr, self.chunk, self.total_rows = (
            words[self.offsets[name] // 4 :]
            for name in ("request", "kv_tile", "o_indptr", "chunk", "total_rows")
        )
        self.valid = self.buffer[self.offsets["valid"] :]
        self.kv_indptr = zeros(self.layers, self.width + 1)
        self.last_page_len = zeros(self.layers, self.width)
        self.page_starts = zeros(self.layers, self.width + 1)
        self.full_starts = zeros(self.layers, self.width + 1)
        self.next_place = zeros(self.layers, buckets)
        self.layer_pages = zeros(self.layers)
        self.lane_start = torch.tensor(lane_start, dtype=torch.int32, device=device)
        self.qo_indptr = torch.arange(self.width + 1, dtype=torch.int32, device=device)
        # Masked loads may compute an address a tile past the last entry.
        self.kv_indices = zeros(num_pages + 1024)
        self.floats = zeros(self.float_bytes(max_batch), dtype=torch.uint8)
        self.plan_info = functools.cache(self._plan_info)

    def float_bytes(self, batch: int) -> int:
        """Partial results of one layer; layers share them."""
        tiles = batch * self.most_heads + self.spare
        of_outputs = _aligned(tiles * self.group * self.head_dim * self.out_bytes)
        return of_outputs + _aligned(tiles * self.group * 4)

    def _plan_info(self, layer: int, batch: int) -> list[int]:
        """The 15 numbers of FlashInfer's PrefillPlanInfo for one layer and batch size."""
        rows = batch * self.heads[layer]
        tiles = rows + self.spare
        at = {name: layer * self.stride + offset for name, offset in self.offsets.items()}
        return [
            tiles,  # padded_batch_size: the grid
            rows,  # total_num_rows
            at["total_rows"],
            tile_rows(self.group),
            at["request"],
            at["qo_tile"],
            at["kv_tile"],
            at["o_indptr"],  # merge_indptr: the same, as every row has one query token
            at["o_indptr"],
            at["chunk"],
            0,  # partial outputs in the float workspace
            _aligned(tiles * self.group * self.head_dim * self.out_bytes),  # their log-sum-exps
            at["valid"],
            1,  # enable_cuda_graph
            1,  # split_kv: FlashInfer merges all rows then, those of one tile too
        ]

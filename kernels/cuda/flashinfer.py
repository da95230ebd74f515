# SPDX-License-Identifier: Apache-2.0
"""Decode attention through FlashInfer's FA2 tensor-core paged kernel, planned on the device.

UNTESTED ON A GPU: written from the sources of FlashInfer 0.6.18; `bench/gpu_check.py` is the first
run. `flashinfer_check` at start-up refuses a FlashInfer whose private plan layout differs.

Heads are folded into the batch: q [bs, n * g, D] is seen as [bs * n, g, D], one row per (request,
head), with one KV head and its own page list. `plan` runs once per step for all layers and `decode`
once per layer. Neither waits for the device nor allocates outside the caller's CUDA graph pool, and
all buffers that FlashInfer reads keep their address, so both can be captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fairkv_sglang.kernels.pages import PAGE_TOKENS, HeadPages

from .tiles import Fold, Tiles, csr_starts, plan_tiles

TESTED = ("0.6.15", "0.6.15.post1", "0.6.18", "0.7.2")
"""FlashInfer versions whose plan layout was read in source and found equal."""

PLAN_FIELDS = 15


def tile_rows(group: int) -> int:
    """cta_tile_q for one query token of `group` heads."""
    if not 1 <= group <= 64:
        raise ValueError(f"FlashInfer decode: group must be 1 to 64 query heads, got {group}")
    return 16 if group <= 16 else 64


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


@triton.jit
def _gather_pages(  # type: ignore[no-untyped-def]
    table, rows, cell, pages, starts, out, width, lanes, max_pages, BLOCK: tl.constexpr
):
    """Program (r, l) copies the page ids of one row into the list for all layers."""
    r, layer = tl.program_id(0), tl.program_id(1)
    n = tl.load(pages + layer * width + r)
    at = tl.load(cell + layer * width + r)
    first = tl.load(starts + layer * (width + 1) + r)
    row = tl.load(rows + at // lanes)
    entry = table + (row * lanes + at % lanes) * max_pages
    for start in range(0, n, BLOCK):
        p = start + tl.arange(0, BLOCK)
        tl.store(out + first + p, tl.load(entry + p, mask=p < n, other=0), mask=p < n)


def gather_pages(
    page_table: torch.Tensor,
    rows: torch.Tensor,
    fold: Fold,
    pages: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write every row's page ids to out[starts[l, r] : starts[l, r] + pages[l, r]]."""
    layers, width = pages.shape
    _gather_pages[(width, layers)](
        page_table, rows, fold.cell, pages, starts, out, width, page_table.shape[1],
        page_table.shape[2], BLOCK=128,
    )  # fmt: skip


class Workspace:
    """The plan of all layers in one byte buffer, as FlashInfer reads it: arrays at byte offsets."""

    def __init__(self, rows: tuple[int, ...], spare: int, device: torch.device | str) -> None:
        self.rows, self.spare, self.width = rows, spare, max(rows)
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
        self.stride = 0
        for name, nbytes in sizes.items():
            self.offsets[name] = self.stride
            self.stride += _aligned(nbytes)
        self.buffer = torch.zeros(len(rows) * self.stride, dtype=torch.uint8, device=device)
        table = self.buffer.view(len(rows), self.stride)

        def part(name: str) -> torch.Tensor:
            return table[:, self.offsets[name] : self.offsets[name] + sizes[name]]

        self.request, self.kv_tile, self.o_indptr, self.chunk = (
            part(name).view(torch.int32) for name in ("request", "kv_tile", "o_indptr", "chunk")
        )
        self.valid = part("valid").view(torch.bool)
        of_layers = torch.tensor(rows, dtype=torch.int32, device=device)[:, None]
        part("total_rows").view(torch.int32).copy_(of_layers)

    def write(self, tiles: Tiles) -> None:
        for name in ("request", "kv_tile", "o_indptr", "chunk", "valid"):
            getattr(self, name).copy_(getattr(tiles, name))

    def plan_info(self, layer: int, group: int, head_dim: int, out_bytes: int) -> list[int]:
        """The 15 numbers of FlashInfer's PrefillPlanInfo for one layer."""
        rows, tiles = self.rows[layer], self.rows[layer] + self.spare
        at = {name: layer * self.stride + offset for name, offset in self.offsets.items()}
        return [
            tiles,  # padded_batch_size: the grid
            rows,  # total_num_rows
            at["total_rows"],
            tile_rows(group),
            at["request"],
            at["qo_tile"],
            at["kv_tile"],
            at["o_indptr"],  # merge_indptr: the same, as every row has one query token
            at["o_indptr"],
            at["chunk"],
            0,  # partial outputs in the float workspace
            _aligned(tiles * group * head_dim * out_bytes),  # their log-sum-exps
            at["valid"],
            1,  # enable_cuda_graph
            1,  # split_kv
        ]

    def float_bytes(self, group: int, head_dim: int, out_bytes: int) -> int:
        """Float workspace that one layer's partial results need; layers share it."""
        tiles = self.width + self.spare
        return _aligned(tiles * group * head_dim * out_bytes) + _aligned(tiles * group * 4)


def batch_bucket(batch: int) -> int:
    """Batch size that a plan is made for; eager batches are padded up to it with row 0.

    Every size has buffers of its own, so sizes are few; they include SGLang's usual graph sizes.
    """
    if batch <= 8:
        return max(1, 1 << (batch - 1).bit_length())
    step = 8 if batch <= 64 else 32
    return -(-batch // step) * step


class _Planned:
    """What is planned for one batch size, in buffers of its own."""

    def __init__(self, decoder: FlashInferDecoder, bs: int) -> None:
        pages, group, device = decoder.pages, decoder.group, decoder.pages.device
        self.bs = bs
        self.fold = Fold.create(bs, list(decoder.lane_start), device)
        self.workspace = Workspace(self.fold.rows, decoder.spare, device)
        layers, width = self.fold.cell.shape
        self.kv_indptr = torch.zeros((layers, width + 1), dtype=torch.int32, device=device)
        self.last_page_len = torch.zeros((layers, width), dtype=torch.int32, device=device)
        self.qo_indptr = torch.arange(width + 1, dtype=torch.int32, device=device)
        sizes = (group, pages.head_dim, pages.dtype.itemsize)
        self.infos = [self.workspace.plan_info(layer, *sizes) for layer in range(layers)]
        need = self.workspace.float_bytes(*sizes)
        if decoder.float_workspace is None or decoder.float_workspace.numel() < need:
            decoder.float_workspace = torch.empty(need, dtype=torch.uint8, device=device)
        self.float_workspace = decoder.float_workspace


class FlashInferDecoder:
    """Folded decode of one rank; the plan of all layers is made on the device.

    Args:
        pages: the rank's head pages on a CUDA device; float16 or bfloat16.
        lane_start: L + 1 lane numbers, layer l has lanes lane_start[l] : lane_start[l + 1].
        group: query heads per KV head.
        scale: softmax scale.
        spare: tiles beyond one per row; None = two per multiprocessor.
        longest_first: order of the tiles.
        module: what runs the plan; None: FlashInfer's kernel. Checks have another one.
    """

    def __init__(
        self,
        pages: HeadPages,
        lane_start: Sequence[int],
        group: int,
        scale: float,
        spare: int | None = None,
        longest_first: bool = True,
        module: Any = None,
    ) -> None:
        if pages.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"FlashInfer decode needs float16 or bfloat16 pages, got {pages.dtype}"
            )
        if lane_start[-1] != pages.lanes:
            raise ValueError(
                f"lane_start ends at {lane_start[-1]}, but there are {pages.lanes} lanes"
            )
        if pages.num_pages * PAGE_TOKENS >= 2**32:
            raise ValueError("FlashInfer counts tokens of a call in 32 bits: use fewer pages")
        device = pages.device
        if spare is None:
            spare = 2 * torch.cuda.get_device_properties(device).multi_processor_count
        self.pages, self.lane_start, self.group, self.scale = pages, lane_start, group, float(scale)
        self.spare, self.longest_first = spare, longest_first
        # One plan is live at a time, so all batch sizes share the page lists. Masked loads may
        # compute an address a tile past the last entry.
        self.kv_indices = torch.zeros(pages.num_pages + 1024, dtype=torch.int32, device=device)
        self.float_workspace: torch.Tensor | None = None
        self.k = pages.k_pages.unsqueeze(2)  # [pages, 16, 1 head, D]
        self.v = pages.v_pages.unsqueeze(2)
        self.module = module or load_module(pages.dtype, pages.head_dim)
        self._by_batch: dict[int, _Planned] = {}
        self._current: _Planned | None = None

    def _sized(self, batch: int) -> _Planned:
        size = batch_bucket(batch)
        if size not in self._by_batch:
            self._by_batch[size] = _Planned(self, size)
        return self._by_batch[size]

    def reserve(self, max_batch: int) -> None:
        """Allocate for the largest batch of a CUDA graph, so that all sizes share its workspace."""
        self._sized(max_batch)

    def plan(self, rows: torch.Tensor) -> None:
        """Once per step, after `grow`: work lists of all layers for rows int64 [bs]."""
        state, self._current = self.pages, self._sized(rows.shape[0])
        to, rows = self._current, _padded(rows, self._current.bs)
        lens = to.fold.lens(state.lens, state.owned, rows)
        tiles = plan_tiles(lens, self.spare, longest_first=self.longest_first)
        to.workspace.write(tiles)
        to.kv_indptr.copy_(csr_starts(tiles.pages))
        to.last_page_len.copy_(tiles.last_page_len)
        gather_pages(state.page_table, rows, to.fold, tiles.pages, to.kv_indptr, self.kv_indices)

    def decode(
        self,
        q: torch.Tensor,
        rows: torch.Tensor,
        layer: int,
        lanes: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Attention of one layer, all of its lanes. q, out: [bs, n * g, D] of the pages' dtype."""
        planned = self._current
        if planned is None:
            raise RuntimeError("FairKV: decode without a plan for this step")
        if scale != self.scale:
            raise ValueError(f"layer {layer} has softmax scale {scale}, planned was {self.scale}")
        n = self.lane_start[layer + 1] - self.lane_start[layer]
        if q.shape != (rows.shape[0], n * self.group, self.pages.head_dim) or out.shape != q.shape:
            raise ValueError(f"layer {layer}: q and out must be [batch, {n * self.group}, D]")
        if planned.bs == q.shape[0]:
            self._run(planned, layer, q, out)
            return
        wide = torch.empty((planned.bs, *out.shape[1:]), dtype=out.dtype, device=out.device)
        self._run(planned, layer, _padded(q, planned.bs), wide)
        out.copy_(wide[: out.shape[0]])

    def _run(self, planned: _Planned, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        rows = planned.fold.rows[layer]
        shape = (rows, self.group, self.pages.head_dim)
        self.module.paged_run(
            planned.float_workspace, planned.workspace.buffer, planned.infos[layer],
            q.contiguous().view(shape), self.k, self.v,
            planned.qo_indptr[: rows + 1], planned.kv_indptr[layer, : rows + 1], self.kv_indices,
            planned.last_page_len[layer, :rows], out.view(shape),
            None,  # log-sum-exp
            0,  # mask mode: none
            0,  # layout: NHD
            -1,  # window
            False,  # programmatic dependent launch reads the plan before the wait: keep off
            None, None, None, None, None, None,  # mask, its indptr, alibi, prefix and item lengths
            0.0,  # soft cap
            self.scale,
            None, None, None,  # scales of q, k, v
            1.0, 1e4,  # rope, not applied
            0,
            planned.float_workspace.numel(),
        )  # fmt: skip


def _padded(values: torch.Tensor, size: int) -> torch.Tensor:
    """``values`` with zeros up to ``size`` rows; row 0 of the request table owns no lane."""
    missing = size - values.shape[0]
    if missing == 0:
        return values
    return torch.cat([values, values.new_zeros((missing, *values.shape[1:]))])


def load_module(dtype: torch.dtype, head_dim: int) -> Any:
    """FlashInfer's FA2 paged kernel for this dtype and head dimension; compiles it on first use."""
    from flashinfer.prefill import get_batch_prefill_module

    return get_batch_prefill_module(
        "fa2", dtype, dtype, dtype, torch.int32, head_dim, head_dim,
        0,  # no positional encoding: keys carry theirs
        False,  # sliding window
        False,  # soft cap
        False,  # fp16 accumulation of q.k
    )  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""Decode attention through FlashInfer's FA2 tensor-core paged kernel, planned on the device.

UNTESTED ON A GPU: written from the sources of FlashInfer 0.6.18; `bench/gpu_check.py` is the first
run. `flashinfer_check` at start-up refuses a FlashInfer whose private plan layout differs.

Heads are folded into the batch: q [bs, n * g, D] is seen as [bs * n, g, D], one row per (request,
head), with one KV head and its own page list. `plan` runs once per step for all layers and `decode`
once per layer. Neither waits for the device nor allocates outside the caller's CUDA graph pool, and
all buffers that FlashInfer reads keep their address, so both can be captured, at any batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fairkv_sglang.kernels.pages import PAGE_TOKENS, HeadPages

from . import operations
from .tiles import BUCKETS, make_tiles
from .workspace import Workspace

TESTED = ("0.6.15", "0.6.15.post1", "0.6.18", "0.7.2")
"""FlashInfer versions whose plan layout was read in source and found equal."""


class FlashInferDecoder:
    """Folded decode of one rank; the plan of all layers is made on the device.

    Args:
        pages: the rank's head pages on a CUDA device; float16 or bfloat16.
        lane_start: L + 1 lane numbers, layer l has lanes lane_start[l] : lane_start[l + 1].
        group: query heads per KV head.
        spare: tiles beyond one per row; None = two per multiprocessor.
        longest_first: order of the tiles.
        module: what runs the plan; None: FlashInfer's kernel. Checks have another one.
    """

    def __init__(
        self,
        pages: HeadPages,
        lane_start: Sequence[int],
        group: int,
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
        if spare is None:
            spare = 2 * torch.cuda.get_device_properties(pages.device).multi_processor_count
        self.pages, self.lane_start, self.group = pages, lane_start, group
        self.spare, self.longest_first = spare, longest_first
        self.k = pages.k_pages.unsqueeze(2)  # [pages, 16, 1 head, D]
        self.v = pages.v_pages.unsqueeze(2)
        self.module = module or load_module(pages.dtype, pages.head_dim)
        self._planned = 0  # batch size
        # A captured graph reads the workspace of its time, even when a larger one has followed.
        self._workspaces: list[Workspace] = []
        self.reserve(pages.rows)

    @property
    def workspace(self) -> Workspace:
        """Buffers of the plan."""
        return self._workspaces[-1]

    def reserve(self, max_batch: int) -> None:
        """Room for batches of up to this size; there is room for all rows of the pages anyway."""
        if not self._workspaces or max_batch > self.workspace.max_batch:
            pages = self.pages
            self._workspaces.append(
                Workspace(
                    max_batch, self.lane_start, self.spare, self.group, pages.head_dim,
                    pages.dtype.itemsize, pages.num_pages, BUCKETS, pages.device,
                )
            )  # fmt: skip

    def plan(self, rows: torch.Tensor) -> None:
        """Once per step, after `grow`: work lists of all layers for rows int64 [bs]."""
        self._planned = rows.shape[0]
        self.reserve(self._planned)
        make_tiles(self.pages, rows, self.workspace, self.longest_first)

    def append(
        self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor
    ) -> torch.Tensor:
        """Write K and V of the new tokens; q, which FlashInfer wants in one piece, with them."""
        if q.is_contiguous():
            operations.append(self.pages, slots, k, v)
            return q
        folded = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        operations.append(self.pages, slots, k, v, q, folded)
        return folded

    def decode(
        self,
        q: torch.Tensor,
        rows: torch.Tensor,
        layer: int,
        lanes: int,
        scale: float,
        out: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Attention of one layer, all of its lanes. q, out: [bs, n * g, D] of the pages' dtype."""
        if sinks is not None:
            raise ValueError("FlashInfer's kernel has no attention sinks")
        to, bs = self.workspace, q.shape[0]
        if bs != self._planned:
            raise RuntimeError(f"FairKV: decode of {bs} requests, planned were {self._planned}")
        if q.shape[1] != to.heads[layer] * self.group or out.shape != q.shape:
            raise ValueError(f"layer {layer}: q and out must be [bs, {to.heads[layer]} * g, D]")
        n = bs * to.heads[layer]
        shape = (n, self.group, self.pages.head_dim)
        self.module.paged_run(
            to.floats, to.buffer, to.plan_info(layer, bs),
            q.contiguous().view(shape), self.k, self.v,
            to.qo_indptr[: n + 1], to.kv_indptr[layer, : n + 1], to.kv_indices,
            to.last_page_len[layer, :n], out.view(shape),
            None,  # log-sum-exp
            0,  # mask mode: none
            0,  # layout: NHD
            -1,  # window
            False,  # programmatic dependent launch reads the plan before the wait: keep off
            None, None, None, None, None, None,  # mask, its indptr, alibi, prefix and item lengths
            0.0,  # soft cap
            float(scale),
            None, None, None,  # scales of q, k, v
            1.0, 1e4,  # rope, not applied
            0,
            to.floats.numel(),
        )  # fmt: skip


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

# SPDX-License-Identifier: Apache-2.0
"""FlashInfer on CUDA: folded decode over head pages.

Imported on CUDA only. See ``docs/gpu-results.md`` for what has run on a GPU.
"""

from __future__ import annotations

import torch

from fairkv_sglang.kernels.flashinfer_decode import FlashInferDecode
from fairkv_sglang.kernels.pages import HeadPages
from fairkv_sglang.runtime import FairKVRuntime


def batch_bucket(batch: int) -> int:
    """Batch size that a plan is made for; eager batches are padded up to it with row 0.

    Every size has buffers of its own, so sizes are few; they include SGLang's usual graph sizes.
    """
    if batch <= 8:
        return max(1, 1 << (batch - 1).bit_length())
    step = 8 if batch <= 64 else 32
    return -(-batch // step) * step


class FlashInferDecoder:
    """Folded decode on CUDA; see :class:`fairkv_sglang.attention.decoders.Decoder`.

    The plan of all layers is computed on the device inside the (captured) step. At start
    FlashInfer's own planner must give the same plan, else the server does not start.

    Args:
        runtime: This rank.
        device: CUDA device.
    """

    def __init__(self, runtime: FairKVRuntime, device: str) -> None:
        from fairkv_sglang.kernels.flashinfer_check import assert_plan_matches_flashinfer

        shape = runtime.shape
        pages = runtime.book.pages
        assert_plan_matches_flashinfer(pages.dtype, shape.head_dim, shape.group_size, device)
        self.runtime = runtime
        self.scale = shape.head_dim**-0.5
        self._by_batch: dict[int, FlashInferDecode] = {}
        self._workspace: torch.Tensor | None = None
        self._kv_indices: torch.Tensor | None = None
        self._current: FlashInferDecode | None = None

    def reserve(self, pages: HeadPages, max_batch: int) -> None:
        """Allocate for the largest batch of a CUDA graph, so that all sizes share its workspace."""
        self._workspace = self._decode(pages, max_batch).float_workspace

    def plan(self, pages: HeadPages, rows: torch.Tensor) -> None:
        """Work lists of all layers, on the device."""
        self._current = self._decode(pages, rows.shape[0])
        self._current.plan(_padded(rows, self._current.bs))

    def decode(
        self,
        pages: HeadPages,
        q: torch.Tensor,
        rows: torch.Tensor,
        layer: int,
        lanes: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """One layer, all of its slots; see the protocol."""
        current = self._current
        if current is None:
            raise RuntimeError("FairKV: decode without a plan for this step")
        if scale != self.scale:
            raise ValueError(f"layer {layer} has softmax scale {scale}, planned was {self.scale}")
        if current.bs == q.shape[0]:
            current.run(layer, q, out)
            return
        wide = torch.empty((current.bs, *out.shape[1:]), dtype=out.dtype, device=out.device)
        current.run(layer, _padded(q, current.bs), wide)
        out.copy_(wide[: out.shape[0]])

    def _decode(self, pages: HeadPages, batch: int) -> FlashInferDecode:
        size = batch_bucket(batch)
        if size not in self._by_batch:
            shared = self._workspace if size <= max(self._by_batch, default=0) else None
            made = FlashInferDecode(
                pages,
                size,
                list(self.runtime.heads.lane_start),
                self.runtime.shape.group_size,
                self.scale,
                float_workspace=shared,
                kv_indices=self._kv_indices,
            )
            self._kv_indices = made.kv_indices
            if shared is None:
                self._workspace = made.float_workspace
            self._by_batch[size] = made
        return self._by_batch[size]


def _padded(values: torch.Tensor, size: int) -> torch.Tensor:
    """``values`` with zeros up to ``size`` rows; row 0 of the request table owns no lane."""
    missing = size - values.shape[0]
    if missing == 0:
        return values
    return torch.cat([values, values.new_zeros((missing, *values.shape[1:]))])

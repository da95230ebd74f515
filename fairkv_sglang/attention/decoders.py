# SPDX-License-Identifier: Apache-2.0
"""Decode attention over head pages: one interface, one implementation per device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from fairkv_sglang.decode_backends import choose
from fairkv_sglang.kernels import ops, reference
from fairkv_sglang.kernels.pages import HeadPages

if TYPE_CHECKING:
    from fairkv_sglang.runtime import FairKVRuntime


class Decoder(Protocol):
    """Attends one new token per request to the head pages of its lanes."""

    def reserve(self, pages: HeadPages, max_batch: int) -> None:
        """Allocate for the largest batch of a CUDA graph."""

    def plan(self, pages: HeadPages, rows: torch.Tensor) -> None:
        """Once per step, for all layers, after the step's tokens got their slots.

        Args:
            pages: Device state.
            rows: ``int64 [bs]`` request-table rows.
        """

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
        """Write ``out [bs, lanes*g, D]`` for ``q`` of the same shape; zeros for lanes not served.

        ``lanes`` counts the layer's first slots whose queries are there.
        """


class PageTableDecoder:
    """Operations that read the page tables themselves and need no plan.

    Args:
        lane_start: ``[L + 1]`` first lane of each layer.
        operation: ``ops.decode``, the device's kernel, or ``reference.decode``, plain torch.
    """

    def __init__(self, lane_start: tuple[int, ...], operation: Callable[..., None]) -> None:
        self.lane_start = lane_start
        self.operation = operation

    def reserve(self, pages: HeadPages, max_batch: int) -> None:
        """Nothing to allocate."""

    def plan(self, pages: HeadPages, rows: torch.Tensor) -> None:
        """Nothing to plan."""

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
        """See :class:`Decoder`."""
        self.operation(pages, q, rows, self.lane_start[layer], lanes, scale, out)


def make_decoder(runtime: FairKVRuntime, device: str) -> Decoder:
    """The implementation that ``--fairkv-decode-backend`` names, or the device's own.

    Raises:
        ValueError: if the named implementation does not run on the device, with those that do.
    """
    name = runtime.decode_backend = choose(runtime.config.decode_backend, device)
    if name == "flashinfer":
        from fairkv_sglang.attention.flashinfer import FlashInferDecoder

        return FlashInferDecoder(runtime, device)
    operation = reference.decode if name == "torch" else ops.decode
    return PageTableDecoder(runtime.heads.lane_start, operation)

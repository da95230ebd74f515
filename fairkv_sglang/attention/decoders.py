# SPDX-License-Identifier: Apache-2.0
"""Decode attention over head pages: one interface, one implementation per device."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Protocol

import torch

from fairkv_sglang.decode_backends import DECODE_BACKENDS, choose
from fairkv_sglang.kernels import HeadPages, torch_decode
from fairkv_sglang.parallel import RankHeads


class Decoder(Protocol):
    """Attends one new token per request to the head pages of its lanes."""

    def reserve(self, max_batch: int) -> None:
        """Allocate for the largest batch of a CUDA graph."""

    def plan(self, rows: torch.Tensor) -> None:
        """Once per step, for all layers, after the step's tokens got their slots.

        Args:
            rows: ``int64 [bs]`` request-table rows.
        """

    def append(
        self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor
    ) -> torch.Tensor:
        """Write the new tokens' K and V ``[bs, n, D]`` to ``slots [bs, n]`` of one layer.

        Returns:
            ``q [bs, n*g, D]`` as :meth:`decode` wants it, maybe copied.
        """

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
        """Write ``out [bs, lanes*g, D]`` for ``q`` of the same shape; zeros for lanes not served.

        ``lanes`` counts the layer's first slots whose queries are there. ``sinks``: ``[lanes*g]``
        attention sinks of the query heads, given if the model has them.
        """


class PageTableDecoder:
    """Kernels that read the page tables themselves and need no plan.

    Args:
        pages: Head pages of this rank.
        lane_start: ``[L + 1]`` first lane of each layer.
        operation: ``decode`` of :class:`fairkv_sglang.kernels.Kernels`, the pages' own or torch's.
    """

    def __init__(
        self, pages: HeadPages, lane_start: tuple[int, ...], operation: Callable[..., None]
    ) -> None:
        self.pages = pages
        self.lane_start = lane_start
        self.operation = operation

    def reserve(self, max_batch: int) -> None:
        """Nothing to allocate."""

    def plan(self, rows: torch.Tensor) -> None:
        """Nothing to plan."""

    def append(
        self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Decoder`."""
        self.pages.kernels.append(self.pages, slots, k, v)
        return q

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
        """See :class:`Decoder`."""
        self.operation(self.pages, q, rows, self.lane_start[layer], lanes, scale, out, sinks)


def flashinfer(pages: HeadPages, heads: RankHeads) -> Decoder:
    """FlashInfer's kernel, after a check that it still reads the plan that is made for it."""
    from fairkv_sglang.kernels.cuda.flashinfer import FlashInferDecoder
    from fairkv_sglang.kernels.cuda.flashinfer_check import assert_plan_matches_flashinfer

    group = heads.group_size
    assert_plan_matches_flashinfer(pages.dtype, pages.head_dim, group, str(pages.device))
    return FlashInferDecoder(pages, heads.lane_start, group)


def own_kernel(pages: HeadPages, heads: RankHeads) -> Decoder:
    """The kernel of the pages' device: numba's or Triton's."""
    return PageTableDecoder(pages, heads.lane_start, pages.kernels.decode)


def plain_torch(pages: HeadPages, heads: RankHeads) -> Decoder:
    """Torch operations, to compare with."""
    return PageTableDecoder(pages, heads.lane_start, torch_decode.decode)


def make_decoder(wanted: str, pages: HeadPages, heads: RankHeads, sinks: bool = False) -> Decoder:
    """The implementation that ``--fairkv-decode-backend`` names, or the device's own.

    Args:
        wanted: Name of the implementation, or ``auto``.
        pages: Head pages of this rank.
        heads: Its lanes.
        sinks: Whether the model has attention sinks.

    Raises:
        ValueError: if the named implementation does not run on the device, with those that do.
    """
    backend = DECODE_BACKENDS[choose(wanted, str(pages.device), sinks)]
    decoder: Decoder = pkgutil.resolve_name(backend.factory)(pages, heads)
    return decoder

# SPDX-License-Identifier: Apache-2.0
"""Head pages of a rank with the operations of their device (``layout.py``, ``interface.py``)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .interface import Kernels
from .layout import (
    PADDING_ROW,
    PAGE_TOKENS,
    RUN_PAGES,
    UNLIMITED,
    PageTensors,
    describe_error,
    huge,
    key_shape,
)

__all__ = ["PADDING_ROW", "PAGE_TOKENS", "RUN_PAGES", "UNLIMITED", "HeadPages", "describe_error"]


@dataclass(kw_only=True)
class HeadPages(PageTensors):
    """The tensors, and what works on them."""

    kernels: Kernels  # operations on this device

    @classmethod
    def create(
        cls,
        num_pages: int,
        rows: int,
        lanes: int,
        max_pages: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        by_columns: bool | None = None,
        most: Sequence[int] | None = None,
    ) -> HeadPages:
        """Zeroed state with every page free.

        Args:
            max_pages: Most pages of one (row, lane), rounded up to whole runs.
            by_columns: How keys lie in a page; None: as the device's own kernels read them.
            most: Of each lane the tokens that it ever holds, 0 for as many as there come; None: no
                lane has a limit.

        Raises:
            ValueError: for sizes or a dtype that no cache can have.
        """
        for name, value in (
            ("num_pages", num_pages),
            ("rows", rows),
            ("lanes", lanes),
            ("max_pages", max_pages),
            ("head_dim", head_dim),
        ):
            if value < 1:
                raise ValueError(f"head pages: {name} must be at least 1, got {value}")
        if num_pages >= 2**31:
            raise ValueError(f"head pages: at most 2^31 - 1 pages (int32 ids), got {num_pages}")
        if not dtype.is_floating_point:
            raise ValueError(f"head pages: dtype must be a floating-point type, got {dtype}")

        def zeros(shape: tuple[int, ...], of: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        on_cpu = torch.device(device).type == "cpu"
        if by_columns is None:
            by_columns = on_cpu
        shapes = (
            key_shape(num_pages, head_dim, dtype, by_columns),
            (num_pages, PAGE_TOKENS, head_dim),
        )
        arenas = [huge(shape, dtype) if on_cpu else zeros(shape, dtype) for shape in shapes]
        # Page 0 is on top of the stack, so that a fresh arena is filled from the front.
        free = torch.arange(num_pages - 1, -1, -1, dtype=torch.int32, device=device)
        return cls(
            k_pages=arenas[0],
            v_pages=arenas[1],
            page_table=zeros((rows, lanes, -(-max_pages // RUN_PAGES)), torch.int32),
            runs=zeros((num_pages, RUN_PAGES), torch.int32),
            lens=zeros((rows, lanes), torch.int32),
            most=torch.tensor(most or [0] * lanes, dtype=torch.int32, device=device),
            turn=zeros((rows, lanes), torch.int32),
            owned=zeros((rows, lanes), torch.uint8),
            room=torch.full((rows,), UNLIMITED, dtype=torch.int64, device=device),
            free_pages=free,
            free_count=torch.full((1,), num_pages, dtype=torch.int64, device=device),
            error=zeros((1,), torch.int32),
            kernels=kernels_for(torch.device(device).type),
        )


@functools.cache
def kernels_for(kind: str) -> Kernels:
    """Operations for tensors on this kind of device, ``torch.device(...).type``.

    Raises:
        ValueError: for a kind of device that FairKV has no kernels for.
    """
    if kind == "cpu":
        from .cpu import operations as on_cpu

        return on_cpu
    if kind == "cuda":
        from .cuda import operations as on_cuda

        return on_cuda
    raise ValueError(f"FairKV kernels run on cpu and cuda, not on {kind}")

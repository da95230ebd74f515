# SPDX-License-Identifier: Apache-2.0
"""Compiles what serving needs before the first request."""

from __future__ import annotations

import logging
import time

import torch

from .pages import HeadPages

logger = logging.getLogger(__name__)


def warm_up(
    dtype: torch.dtype, head_dim: int, group: int = 1, device: torch.device | str = "cpu"
) -> float:
    """Run every operation once on a small problem; returns and logs the seconds it took."""
    start = time.perf_counter()
    pages = HeadPages.create(2, 2, 1, 1, head_dim, dtype, device)
    kernels = pages.kernels
    row = torch.ones(1, dtype=torch.int64, device=device)
    slot = torch.empty((1, 1), dtype=torch.int64, device=device)
    q = torch.ones((1, group, head_dim), dtype=dtype, device=device)
    kernels.set_owned(pages, 1, torch.ones(1, dtype=torch.uint8, device=device))
    kernels.store_kept(pages, 1, 0, q[:, :1], q[:, :1], row - 1, row[None] - 1, row)
    kernels.grow(pages, row, slot)
    kernels.append(pages, slot, q[:, :1], q[:, :1])
    kernels.decode(pages, q, row, 0, 1, 1.0, torch.empty_like(q))
    kernels.release(pages, row)
    pages.check_integrity()
    seconds = time.perf_counter() - start
    logger.info(
        "FairKV kernels ready on %s in %.1f s (%s, head dimension %d, group %d)",
        pages.device, seconds, dtype, head_dim, group,
    )  # fmt: skip
    return seconds

# SPDX-License-Identifier: Apache-2.0
"""Head pages with the length distributions that benchmarks and checks use."""

from __future__ import annotations

import torch

from fairkv_sglang.kernels import PAGE_TOKENS, HeadPages
from fairkv_sglang.kernels.layout import RUN_PAGES

KINDS = ("uniform", "lognormal", "heavy")


def lengths(kind: str, rows: int, mean: int, seed: int = 0) -> torch.Tensor:
    """int64 [rows] lengths of sum rows * mean, each at least 1.

    uniform: all equal. lognormal: sigma 0.8. heavy: every tenth row is 32 times as long as the
    others, as with a few retrieval heads among streaming heads.
    """
    if kind == "uniform":
        weights = torch.ones(rows, dtype=torch.float64)
    elif kind == "lognormal":
        make = torch.Generator().manual_seed(seed)
        weights = (0.8 * torch.randn(rows, generator=make, dtype=torch.float64)).exp()
    elif kind == "heavy":
        weights = torch.ones(rows, dtype=torch.float64)
        weights[::10] = 32
    else:
        raise ValueError(f"lengths: unknown kind {kind!r}, one of {', '.join(KINDS)}")
    total = rows * mean
    ends = (weights.cumsum(0) / weights.sum() * (total - rows)).round().long()
    return ends.diff(prepend=torch.zeros(1, dtype=torch.int64)) + 1


def resident(
    lens: torch.Tensor,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    scattered: bool = False,
    seed: int = 0,
    by_columns: bool | None = None,
    arena: HeadPages | None = None,
) -> HeadPages:
    """Random head pages in which row i + 1 holds lens[i, lane] tokens; row 0 pads.

    Args:
        lens: integer [bs, lanes].
        scattered: pages of a lane at random places of the arena instead of in runs.
        by_columns: how keys lie in a page; None: as the device's own kernels read them.
        arena: takes its keys and values if they are enough, instead of new random ones.
    """
    bs, lanes = lens.shape
    held = (lens + (PAGE_TOKENS - 1)) // PAGE_TOKENS
    total, widest = int(held.sum()), int(held.max()) + 1
    pages = HeadPages.create(
        total + bs * lanes, bs + 1, lanes, widest, head_dim, dtype, device, by_columns
    )
    if arena and arena.num_pages >= pages.num_pages and arena.head_dim == head_dim:
        pages.k_pages = arena.k_pages[: pages.num_pages]
        pages.v_pages = arena.v_pages[: pages.num_pages]
    else:
        make = torch.Generator(pages.device).manual_seed(seed)
        pages.k_pages.normal_(generator=make)
        pages.v_pages.normal_(generator=make)
    order = torch.arange(pages.num_pages, dtype=torch.int32)
    if scattered:
        order = torch.randperm(pages.num_pages, generator=torch.Generator().manual_seed(seed)).int()
    table = torch.zeros((bs, lanes, pages.max_pages), dtype=torch.int32)
    table[torch.arange(pages.max_pages) < held[..., None]] = order[:total]
    runs = table.unflatten(2, (-1, RUN_PAGES))
    first = runs[..., 0]
    used = torch.arange(pages.max_runs) * RUN_PAGES < held[..., None]
    pages.page_table[1:].copy_(first)
    pages.runs[first[used].long().to(device)] = runs[used].to(device)
    pages.lens[1:].copy_(lens)
    pages.owned[1:] = 1
    left = order[total:].flip(0)
    pages.free_pages[: len(left)].copy_(left)
    pages.free_count.fill_(len(left))
    return pages

# SPDX-License-Identifier: Apache-2.0
"""Random head pages for the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from fairkv_sglang.kernels import PAGE_TOKENS, HeadPages
from fairkv_tests import reference


def filled(
    lens: Sequence[Sequence[int]],
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    owned: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    by_columns: bool | None = None,
) -> HeadPages:
    """Pages that hold random rows of the given lengths [rows, lanes], scattered over the arena.

    Row 0 is the padding row and must be empty. Whatever no row holds is NaN, so that reading it
    shows in a result.
    """
    make = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lens, dtype=torch.int32)
    held = -(-lengths // PAGE_TOKENS)
    total, widest = int(held.sum()), int(held.max())
    pages = HeadPages.create(
        total + 5, *lengths.shape, widest + 2, head_dim, dtype, by_columns=by_columns
    )
    order = torch.randperm(pages.num_pages, generator=make).int()
    pages.k_pages.fill_(torch.nan)
    pages.v_pages.fill_(torch.nan)
    pages.page_table.fill_(-1)
    pages.runs.fill_(-1)
    taken = 0
    for row in range(pages.rows):
        for lane in range(pages.lanes):
            n, count = int(lengths[row, lane]), int(held[row, lane])
            ids = order[taken : taken + count]
            for number, page in enumerate(ids.tolist()):
                reference.put_page(pages, row, lane, number, page)
            taken += count
            for i in range(n):
                for arena in (pages.keys, pages.v_pages):
                    where = arena[ids[i // PAGE_TOKENS], i % PAGE_TOKENS]
                    where.copy_(torch.randn(head_dim, generator=make).view_as(where))
    pages.lens.copy_(lengths)
    pages.owned[1:] = 1
    if owned is not None:
        pages.owned.copy_(torch.tensor(owned))
    pages.free_count.fill_(pages.num_pages - taken)
    pages.free_pages[: pages.num_pages - taken] = order[taken:]
    pages.check_integrity()
    return pages


@pytest.fixture(scope="session", name="filled")
def _filled() -> Callable[..., HeadPages]:
    return filled

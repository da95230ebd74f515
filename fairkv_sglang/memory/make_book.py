# SPDX-License-Identifier: Apache-2.0
"""The memory of a rank as a whole: arena, page tables, ledger, and the book on them."""

from __future__ import annotations

import numpy as np
import torch

from fairkv_sglang.budgets import BudgetScope
from fairkv_sglang.kernels.pages import HeadPages
from fairkv_sglang.memory.demand import PageDemand
from fairkv_sglang.memory.page_ledger import PageLedger
from fairkv_sglang.memory.recent import RecentQueries
from fairkv_sglang.memory.rows import RowBook
from fairkv_sglang.memory.sizing import MemoryDivision
from fairkv_sglang.parallel import RankHeads
from fairkv_sglang.placement import Router


def make_book(
    heads: RankHeads,
    scope: BudgetScope,
    division: MemoryDivision,
    *,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    window: int,
    verbose: bool,
    forecast_factor: float = 1.0,
    slack: int | None = None,
    recent: int | None = None,
) -> RowBook:
    """Allocate the arena and the page tables of a rank, and open the book on them.

    Args:
        heads, scope, window, verbose, forecast_factor, slack: As :class:`RowBook` has them.
        recent: Output tokens of a row whose queries are kept; None: of none.
        division: Division of the KV memory.
        head_dim: D.
        dtype: Of K and V.
        device: Where SGLang's pool is.
    """
    table, rows, most = heads.table, division.max_requests + 1, None
    if scope.sliding is not None:
        slides = scope.sliding.mask(scope.num_layers)[heads.lane_layer]
        most = np.where(slides, scope.sliding.window, 0).tolist()
    queries = None
    if recent is not None:
        queries = RecentQueries(
            rows=rows,
            window=recent,
            lanes=heads.num_lanes,
            group=heads.group_size,
            head_dim=head_dim,
            dtype=dtype,
            device=torch.device(device),
        )
    return RowBook(
        heads=heads,
        scope=scope,
        demand=PageDemand(scope, heads.plan.shares() > 0, None if table.fixed else table.capacity),
        router=Router(heads.plan),
        ledger=PageLedger(np.asarray(division.arena_pages), scope.sliding),
        pages=HeadPages.create(
            num_pages=int(division.arena_pages[heads.rank]),
            rows=rows,
            lanes=heads.num_lanes,
            max_pages=division.max_pages,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            most=most,
        ),
        pool_tokens=division.pool_tokens,
        window=window,
        verbose=verbose,
        forecast_factor=forecast_factor,
        slack=slack,
        recent=queries,
    )

# SPDX-License-Identifier: Apache-2.0
"""How many head pages a prompt can take on each rank, before its scores are known."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.budgets import BudgetScope
from fairkv_sglang.memory.ledger import PAGE_TOKENS, Pages
from fairkv_sglang.placement import Plan


class PageDemand:
    """Upper bounds, in pages per rank, equal on all ranks.

    Args:
        scope: The budget scope that decides kept counts.
        plan: Placement of the heads.
    """

    def __init__(self, scope: BudgetScope, plan: Plan) -> None:
        self.scope = scope
        self.plan = plan
        served = plan.shares() > 0  # [L, R, H]
        self.lanes: Pages = served.sum(axis=(0, 2)).astype(np.int64)
        self.expected_lanes: NDArray[np.float64] = plan.shares().sum(axis=(0, 2))
        self._served = served
        self.any_owner = lru_cache(maxsize=4096)(self._any_owner)

    def _any_owner(self, prompt_len: int) -> Pages:
        """``[R]`` pages of a prompt of ``prompt_len`` tokens whoever owns its copied heads."""
        return self._pages(prompt_len, self._served)

    def with_owners(self, prompt_len: int, owners: NDArray[np.integer]) -> Pages:
        """``[R]`` pages of a prompt of ``prompt_len`` tokens with ``owners [L, H]``."""
        ranks = np.arange(self.plan.tp_size)[None, :, None]
        return self._pages(prompt_len, owners[:, None, :] == ranks)

    def lone_request(self, prompt_len: int) -> Pages:
        """``[R]`` pages charged to an otherwise idle server for a prompt, spare pages included."""
        pages: Pages = self.any_owner(prompt_len) + self.lanes
        return pages

    def _pages(self, prompt_len: int, mine: NDArray[np.bool_]) -> Pages:
        caps = self.scope.per_head_bound(prompt_len)  # [L, H]
        each = (-(-caps // PAGE_TOKENS))[:, None, :] * mine  # [L, R, H]
        pages = each.sum(axis=2)
        if self.scope.input_dependent:
            for rank in range(self.plan.tp_size):
                heads = [np.flatnonzero(row).tolist() for row in mine[:, rank]]
                tokens = self.scope.bound(prompt_len, heads)
                count = mine[:, rank].sum(axis=1)
                total = (tokens + (PAGE_TOKENS - 1) * count) // PAGE_TOKENS
                pages[:, rank] = np.minimum(pages[:, rank], total)
        result: Pages = pages.sum(axis=0).astype(np.int64)
        return result

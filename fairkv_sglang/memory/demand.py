# SPDX-License-Identifier: Apache-2.0
"""How many head pages a prompt can take on each rank, before its scores are known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.budgets import BudgetScope
from fairkv_sglang.memory.page_ledger import PAGE_TOKENS, Pages


class PageDemand:
    """Upper bounds, in pages per rank, equal on all ranks.

    Args:
        scope: The budget scope that decides kept counts.
        served: ``[L, R, H]`` lanes to which requests may be routed.
        capacity: ``[L, R]`` lane slots, if other lanes may take the place of these.
    """

    def __init__(
        self,
        scope: BudgetScope,
        served: NDArray[np.bool_],
        capacity: NDArray[np.integer] | None = None,
    ) -> None:
        self.scope = scope
        self.capacity = capacity
        self.under_any_plan = lru_cache(maxsize=4096)(self._under_any_plan)
        self.set_lanes(served)

    def set_lanes(self, served: NDArray[np.bool_]) -> None:
        """Requests are routed to other lanes from now on."""
        self._served = served.copy()
        self.lanes: Pages = served.sum(axis=(0, 2)).astype(np.int64)
        copies = np.maximum(served.sum(axis=1, keepdims=True), 1)
        # of one request: the mean, as copies share requests
        by_layer = (served / copies).sum(axis=2)  # [L, R]
        self.expected_lanes: NDArray[np.float64] = by_layer.sum(axis=0)
        self._growing = by_layer[list(self.scope.layers)].sum(axis=0)

    def with_owners(
        self, prompt_len: int, owners: NDArray[np.integer], scope: BudgetScope | None = None
    ) -> Pages:
        """``[R]`` pages of a prompt of ``prompt_len`` tokens with ``owners [L, H]``.

        ``scope``: of a request with a budget of its own.
        """
        ranks = np.arange(self._served.shape[1])[None, :, None]
        return self._pages(scope or self.scope, prompt_len, owners[:, None, :] == ranks)

    def lone_request(self, prompt_len: int, scope: BudgetScope | None = None) -> Pages:
        """``[R]`` pages of a prompt whoever owns its copied heads, spare pages included.

        ``scope``: of a request with a budget of its own.
        """
        pages: Pages = self._pages(scope or self.scope, prompt_len, self._served) + self.lanes
        return pages

    def of_tokens(self, tokens: NDArray[np.number]) -> Pages:
        """``[R]`` pages of heads that hold ``tokens [L, H]``, for whichever lanes the slots may
        come to hold.
        """
        pages = -(-tokens.astype(np.int64) // PAGE_TOKENS)
        if self.capacity is None:
            total: Pages = (pages[:, None, :] * self._served).sum(axis=(0, 2))
            return total
        first = np.concatenate(
            [np.zeros((len(pages), 1), dtype=np.int64), (-np.sort(-pages, axis=1)).cumsum(axis=1)],
            axis=1,
        )
        slots = np.minimum(self.capacity, pages.shape[1])
        fullest: Pages = np.take_along_axis(first, slots, axis=1).sum(axis=0)
        return fullest

    def growth(self, tokens: float, in_rings: Pages | None = None) -> Pages:
        """``[R]`` pages that so many tokens of output take, whoever writes them.

        ``in_rings``: ``[R]`` the most that lanes with a sliding window can take of them; None: one
        request writes them all.
        """
        pages = np.ceil(self._growing * (tokens / PAGE_TOKENS))
        growth: Pages = pages.astype(np.int64)
        if self.scope.sliding is not None:
            each = tokens if in_rings is not None else min(tokens, self.scope.sliding.window)
            rings = np.ceil((self.expected_lanes - self._growing) * (each / PAGE_TOKENS))
            most = rings if in_rings is None else np.minimum(rings, in_rings)
            growth += most.astype(np.int64)
        return growth

    def output(self, left: Pages, prompt_len: int) -> int:
        """Tokens that a request with ``left [R]`` pages may write, whichever lanes it has."""
        lanes = self.most_lanes
        tokens = int((left // np.maximum(lanes, 1)).min())
        sliding = self.scope.sliding
        if sliding is not None:  # once their lanes are full the others have the rest
            growing = self._most_lanes(self.scope.layers)
            more = -(-sliding.window // PAGE_TOKENS) - sliding.kept(prompt_len) // PAGE_TOKENS
            beyond = (left - (lanes - growing) * more) // np.maximum(growing, 1)
            tokens = max(tokens, int(beyond.min()))
        return tokens * PAGE_TOKENS

    def _under_any_plan(self, prompt_len: int, scope: BudgetScope | None = None) -> Pages:
        """``[R]`` as :meth:`lone_request`, for whichever lanes the slots may come to hold.

        ``scope``: of a request with a budget of its own.
        """
        scope = scope or self.scope
        if self.capacity is None:
            return self.lone_request(prompt_len, scope)
        # The heads that could take most, as many as there are slots; of equal ones those that do
        # not share a budget (scope rank: heads at home on one rank do).
        caps = scope.per_head_bound(prompt_len)
        group = np.arange(caps.shape[1]) % scope.home_size
        order = np.lexsort((np.broadcast_to(group, caps.shape), -caps), axis=1)
        place = np.argsort(order, axis=1)  # [L, H]
        pages: Pages = self._pages(scope, prompt_len, place[:, None, :] < self.capacity[:, :, None])
        return pages + self.most_lanes

    @property
    def most_lanes(self) -> Pages:
        """``[R]`` heads that a request may have on a rank under any plan."""
        return self.lanes if self.capacity is None else self._most_lanes(range(len(self._served)))

    def _most_lanes(self, layers: Sequence[int]) -> Pages:
        """The same of some layers."""
        lanes = self._served.sum(axis=2) if self.capacity is None else self.capacity  # [L, R]
        heads = self._served.shape[2]
        most: Pages = np.minimum(lanes, heads)[list(layers)].sum(axis=0).astype(np.int64)
        return most

    def _pages(self, scope: BudgetScope, prompt_len: int, mine: NDArray[np.bool_]) -> Pages:
        caps = scope.per_head_bound(prompt_len)  # [L, H]
        each = (-(-caps // PAGE_TOKENS))[:, None, :] * mine  # [L, R, H]
        parts = scope.budgets, -1, mine.shape[1]
        pages = each.sum(axis=2).reshape(parts).sum(axis=1)  # [layers or 1, R]
        if scope.input_dependent:
            count = mine.sum(axis=2).reshape(parts).sum(axis=1)
            for rank in range(mine.shape[1]):
                heads = [np.flatnonzero(row).tolist() for row in mine[:, rank]]
                tokens = scope.bound(prompt_len, heads)
                total = (tokens + (PAGE_TOKENS - 1) * count[:, rank]) // PAGE_TOKENS
                pages[:, rank] = np.minimum(pages[:, rank], total)
        result: Pages = pages.sum(axis=0).astype(np.int64)
        return result

# SPDX-License-Identifier: Apache-2.0
"""What a request wants kept of its prompt, where it says so itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fairkv_sglang.budgets.scopes.base import BudgetScope, BudgetSpec
from fairkv_sglang.budgets.waterfill import IntArray

Span = tuple[int, int]


@dataclass(frozen=True)
class Keep:
    """Budget and protected tokens of one request; the same on every rank.

    Attributes:
        spec: Its budget; None: the server's.
        spans: Tokens ``[start, end)`` of the prompt that every head keeps, ascending and disjoint
            (:func:`merged`); what is beyond the prompt, or in the scorer's window, changes nothing.
    """

    spec: BudgetSpec | None = None
    spans: tuple[Span, ...] = ()

    def scope(self, server: BudgetScope, prompt_len: int) -> BudgetScope:
        """The server's scope with this budget, for a prompt of ``prompt_len`` tokens."""
        before = prompt_len - server.window
        protected = sum(max(min(end, before) - start, 0) for start, end in self.spans)
        return server.variant(self.spec, protected)

    def positions(self, before: int) -> IntArray:
        """Ascending positions of the protected tokens below ``before``: those that are scored."""
        parts = [np.arange(start, min(end, before), dtype=np.int64) for start, end in self.spans]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])


AS_SERVER = Keep()
"""Of a request that says nothing."""


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same tokens in ascending spans that neither overlap nor touch nor are empty."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        elif start < end:
            result.append((start, end))
    return tuple(result)

# SPDX-License-Identifier: Apache-2.0
"""What a request wants kept of its prompt, where it says so itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fairkv_sglang.budgets.scopes.base import BudgetScope, BudgetSpec, ScopeMethod
from fairkv_sglang.budgets.scorers import Scorer
from fairkv_sglang.budgets.waterfill import IntArray

Span = tuple[int, int]


@dataclass(frozen=True)
class Keep:
    """Budget, protected tokens and method of one request; the same on every rank.

    Attributes:
        spec: Its budget; None: the server's.
        spans: Tokens ``[start, end)`` of the prompt that every head keeps, ascending and disjoint
            (:func:`merged`); what is beyond the prompt, or in the scorer's window, changes nothing.
        scorer: Its scorer; None: the server's.
        method: Its scope, with options; None: the server's.
    """

    spec: BudgetSpec | None = None
    spans: tuple[Span, ...] = ()
    scorer: Scorer | None = None
    method: ScopeMethod | None = None

    @property
    def has_method(self) -> bool:
        """Whether it names a scorer or a scope of its own."""
        return self.scorer is not None or self.method is not None

    def scope(self, server: BudgetScope, prompt_len: int) -> BudgetScope:
        """The scope that the prompt of ``prompt_len`` tokens has on a server with this one."""
        own = None if self.scorer is None else (self.scorer.window, self.scorer.sink)
        before = prompt_len - (server.window if own is None else own[0])
        protected = sum(max(min(end, before) - start, 0) for start, end in self.spans)
        return server.variant(self.spec, protected, self.method, own)

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

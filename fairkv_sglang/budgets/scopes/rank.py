# SPDX-License-Identifier: Apache-2.0
"""Scope ``rank``: Ada-KV over the heads at home on one rank only, for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from fairkv_sglang.budgets.scopes.base import SCOPES
from fairkv_sglang.budgets.scopes.pooled import Pooled
from fairkv_sglang.budgets.waterfill import IntArray


@SCOPES.register
class Rank(Pooled):
    """The heads at home on a rank compete among themselves for n * B(N) tokens.

    Homes are balanced by construction and their scores need no exchange, but kept tokens depend on
    the number of ranks: it is another method at every TP. At TP 1 it equals ``layer``.

    ``expected`` is B(N) for every head: any group keeps its sum exactly. A group is the
    :attr:`home_size` heads at home on a rank.
    """

    name: ClassVar[str] = "rank"
    input_dependent: ClassVar[bool] = True
    spans_ranks: ClassVar[bool] = False

    def _expected(self, prompt_len: int) -> IntArray:
        shape = (self.num_layers, self.num_heads)
        return np.full(shape, self.budget(prompt_len), dtype=np.int64)

    def _per_head_bound(self, prompt_len: int) -> IntArray:
        shape = (self.num_layers, self.num_heads)
        return np.full(shape, self._most(prompt_len, 1, self.home_size), dtype=np.int64)

    def most(self, layer: int, prompt_len: int, heads: Sequence[int]) -> int:
        """See the base class."""
        members = np.bincount(np.asarray(heads, dtype=np.int64) // self.home_size)
        return sum(self._most(prompt_len, int(n), self.home_size) for n in members if n)

# SPDX-License-Identifier: Apache-2.0
"""Scope ``rank``: Ada-KV over the heads of one rank only, for comparison."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fairkv_sglang.budgets.scopes.base import SCOPES, Heads
from fairkv_sglang.budgets.scopes.pooled import Pooled
from fairkv_sglang.budgets.waterfill import IntArray


@SCOPES.register
class Rank(Pooled):
    """The heads given to ``select`` compete among themselves for n * B(N) tokens.

    Ranks with equal numbers of heads are balanced by construction and need no exchange, but kept
    tokens depend on the placement: it is another method at every TP. At TP 1 it equals ``layer``.

    ``expected`` is B(N) for every head: any group keeps its sum exactly. ``bound`` is exact for the
    groups that are given to ``select``, and must be told of them when it is asked about a part of
    one; ``per_head_bound`` allows for a group of all heads.
    """

    name: ClassVar[str] = "rank"
    input_dependent: ClassVar[bool] = True
    spans_ranks: ClassVar[bool] = False

    def _expected(self, prompt_len: int) -> IntArray:
        shape = (self.num_layers, self.num_heads)
        return np.full(shape, self.budget(prompt_len), dtype=np.int64)

    def _per_head_bound(self, prompt_len: int) -> IntArray:
        shape = (self.num_layers, self.num_heads)
        return np.full(shape, self._most(prompt_len, 1, self.num_heads), dtype=np.int64)

    def _bound(self, prompt_len: int, heads: Heads, groups: tuple[int, ...]) -> IntArray:
        most = [
            self._most(prompt_len, len(members), group)
            for members, group in zip(heads, groups, strict=True)
        ]
        return np.array(most, dtype=np.int64)

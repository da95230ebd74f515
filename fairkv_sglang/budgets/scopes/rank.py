# SPDX-License-Identifier: Apache-2.0
"""Scope ``rank``: Ada-KV over the heads at home on one rank only, for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fairkv_sglang.budgets.scopes.base import SCOPES
from fairkv_sglang.budgets.scopes.pooled import Pooled


@SCOPES.register
@dataclass(eq=False, kw_only=True)
class Rank(Pooled):
    """The heads at home on a rank compete among themselves for n * B(N) tokens.

    Homes are balanced by construction and their scores need no exchange, but kept tokens depend on
    the number of ranks: it is another method at every TP. At TP 1 it equals ``layer``.

    ``expected`` is B(N) for every head: any group keeps its sum exactly. A group is the
    :attr:`home_size` heads at home on a rank.
    """

    name: ClassVar[str] = "rank"
    summary: ClassVar[str] = "the best tokens of the heads of one rank"
    spans_ranks: ClassVar[bool] = False

    @property
    def group(self) -> int:
        """See the base class."""
        return self.home_size

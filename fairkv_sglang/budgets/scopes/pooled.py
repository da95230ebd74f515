# SPDX-License-Identifier: Apache-2.0
"""Ada-KV (arXiv 2407.11550): one top-k over the scores of several heads, with a floor for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fairkv_sglang.budgets.scopes.base import Floored
from fairkv_sglang.budgets.selection import pooled_counts
from fairkv_sglang.budgets.waterfill import IntArray


@dataclass(eq=False, kw_only=True)
class Pooled(Floored, ABC):
    """n heads compete for n * (B - window) tokens, of which each keeps its own best in any case.

    These are int(B * alpha) - window tokens, as in kvpress: with the window, every head has at
    least the share alpha of the mean budget. The n heads are those given to ``counts``. The head
    whose attention is *dispersed* over many tokens wins them from heads that concentrate theirs on
    few.
    """

    input_dependent: ClassVar[bool] = True

    @property
    @abstractmethod
    def group(self) -> int:
        """Neighbouring heads that compete among themselves."""

    def _counts(self, layer: int, heads: Sequence[int], scores: Tensor, prompt_len: int) -> Tensor:
        beyond = self.budget(prompt_len) - self.window
        order = np.argsort(np.asarray(heads, dtype=np.int64), kind="stable").tolist()
        total, floor = len(heads) * beyond, self.floor(prompt_len)
        return self.window + pooled_counts(scores, total, order, floor)

    def _per_head_bound(self, prompt_len: int) -> IntArray:
        return self._alike(self._most(prompt_len, 1))

    def most(self, layer: int, prompt_len: int, heads: Sequence[int]) -> int:
        """See the base class."""
        if layer not in self.layers:
            return super().most(layer, prompt_len, heads)
        members = np.bincount(np.asarray(heads, dtype=np.int64) // self.group)
        return sum(self._most(prompt_len, int(n)) for n in members if n)

    def _most(self, prompt_len: int, members: int) -> int:
        """Most tokens that ``members`` of a group of heads may keep together."""
        budget, group = self.budget(prompt_len), self.group
        if budget >= prompt_len:
            return members * prompt_len
        beyond, floor = budget - self.window, self.floor(prompt_len)
        scored = prompt_len - self.window
        won = min(members * (scored - floor), group * (beyond - floor))
        return members * (self.window + floor) + won

# SPDX-License-Identifier: Apache-2.0
"""Ada-KV (arXiv 2407.11550): one top-k over the scores of several heads, with a floor for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fairkv_sglang.budgets.scopes.base import Floored
from fairkv_sglang.budgets.selection import pooled_counts
from fairkv_sglang.budgets.waterfill import IntArray


def share_out(pooled: Tensor, beyond: int, floor: int, order: Sequence[int]) -> Tensor:
    """Budgets beyond the window from the counts of a pooled top-k.

    With E = ``beyond`` (mean budget beyond the window), f = ``floor`` and n heads:

        cap[i] = f + pooled[i] * (E - f) / E,   sum over i = n * E

    rounded down, the missing tokens to the largest remainders, first in ``order`` among equals.
    This is Ada-KV's round(count * (1 - alpha) + int(E * alpha)) with alpha = f / E exactly, which
    is what keeps the total; all arithmetic is on integers.

    Args:
        pooled: int64 [n], sums to n * E.
        beyond: E >= 1.
        floor: f, between 0 and E.
        order: The rows by head index.
    """
    rows = torch.tensor(order, dtype=torch.int64).to(pooled.device, non_blocking=True)
    quota = pooled[rows] * (beyond - floor)
    caps = floor + torch.div(quota, beyond, rounding_mode="floor")
    missing = len(order) * beyond - caps.sum()
    best = torch.sort(quota % beyond, descending=True, stable=True).indices
    one_more = (torch.arange(len(order), device=pooled.device) < missing).to(torch.int64)
    caps = caps.index_add(0, best, one_more)
    return torch.empty_like(caps).index_copy_(0, rows, caps)


@dataclass(eq=False, kw_only=True)
class Pooled(Floored, ABC):
    """Heads compete for n * (B - window) tokens, but for a floor of int((B - window) * alpha) each.

    The n heads are those given to ``counts``. The head whose attention is *dispersed* over many
    tokens wins them from heads that concentrate theirs on few.
    """

    input_dependent: ClassVar[bool] = True

    @property
    @abstractmethod
    def group(self) -> int:
        """Neighbouring heads that compete among themselves."""

    def _counts(self, layer: int, heads: Sequence[int], scores: Tensor, prompt_len: int) -> Tensor:
        beyond = self.budget(prompt_len) - self.window
        order = np.argsort(np.asarray(heads, dtype=np.int64), kind="stable").tolist()
        pooled = pooled_counts(scores, len(heads) * beyond, order)
        return self.window + share_out(pooled, beyond, self.floor(prompt_len), order)

    def _per_head_bound(self, prompt_len: int) -> IntArray:
        return self._alike(self._most(prompt_len, 1))

    def most(self, layer: int, prompt_len: int, heads: Sequence[int]) -> int:
        """See the base class."""
        members = np.bincount(np.asarray(heads, dtype=np.int64) // self.group)
        return sum(self._most(prompt_len, int(n)) for n in members if n)

    def _most(self, prompt_len: int, members: int) -> int:
        """Most tokens that ``members`` of a group of heads may keep together."""
        budget, group = self.budget(prompt_len), self.group
        if budget >= prompt_len:
            return members * prompt_len
        beyond, floor = budget - self.window, self.floor(prompt_len)
        scored, total = prompt_len - self.window, group * beyond
        pooled = min(members * scored, total)
        # Each quota is rounded up by at most (E - 1) / E.
        rounded = (pooled * (beyond - floor) + members * (beyond - 1)) // beyond
        others = (group - members) * floor
        most = members * self.window + min(
            members * floor + rounded, total - others, members * scored
        )
        # One head's quota rounds up by less than a token, which several may not add up.
        return most if members < 2 else min(most, members * self._most(prompt_len, 1))

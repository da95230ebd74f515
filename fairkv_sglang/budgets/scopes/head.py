# SPDX-License-Identifier: Apache-2.0
"""Scope ``head``: static caps from a profile."""

from __future__ import annotations

from typing import ClassVar

from fairkv_sglang.budgets.scopes.base import SCOPES, BudgetScope, BudgetSpec
from fairkv_sglang.budgets.waterfill import IntArray, water_fill
from fairkv_sglang.profiles import HeadProfile


@SCOPES.register
class Head(BudgetScope):
    """cap[l, h] = clip(level * share[l, h], floor, N), sum over all heads = L * H * B(N).

    floor = window + max(sink, 1, int((B - window) * floor_alpha)). Without clipping level is
    L * H * B: share relative to the mean times the mean budget. What floors add and short prompts
    cut off is spread over the other heads of all layers in proportion to their shares
    (water-filling).
    """

    name: ClassVar[str] = "head"
    input_dependent: ClassVar[bool] = False
    spans_ranks: ClassVar[bool] = False

    def __init__(
        self,
        spec: BudgetSpec,
        num_layers: int,
        num_heads: int,
        window: int,
        profile: HeadProfile | None = None,
        sink: int = 0,
    ) -> None:
        if profile is None:
            raise ValueError(
                "budget scope 'head' takes its caps from a head profile: give one, "
                "or use scope uniform, layer or rank"
            )
        self._shares = profile.shares
        super().__init__(spec, num_layers, num_heads, window, profile, sink)

    def _expected(self, prompt_len: int) -> IntArray:
        budget = self.budget(prompt_len)
        low = min(max(self.least, self.window + self.floor(prompt_len)), budget)
        caps = water_fill(self._shares.ravel(), budget * self._shares.size, low, prompt_len)
        return caps.reshape(self._shares.shape)

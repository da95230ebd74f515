# SPDX-License-Identifier: Apache-2.0
"""Scope ``head``: static caps from a profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fairkv_sglang.budgets.scopes.base import SCOPES, Floored
from fairkv_sglang.budgets.waterfill import IntArray, water_fill


@SCOPES.register
@dataclass(eq=False, kw_only=True)
class Head(Floored):
    """cap[l, h] = clip(level * share[l, h], floor, N), sum over all heads = L * H * B(N).

    floor = max(window + max(sink, 1), int(B * floor_alpha)). Without clipping level is
    L * H * B: share relative to the mean times the mean budget. What floors add and short prompts
    cut off is spread over the other heads of all layers in proportion to their shares
    (water-filling).
    """

    name: ClassVar[str] = "head"
    summary: ClassVar[str] = "fixed shares from the profile"
    input_dependent: ClassVar[bool] = False
    spans_ranks: ClassVar[bool] = False
    needs_profile: ClassVar[bool] = True

    def _expected(self, prompt_len: int) -> IntArray:
        shares, budget = self.shares, self.budget(prompt_len)
        low = min(max(self.least, self.window + self.floor(prompt_len)), budget)
        caps = water_fill(shares.ravel(), budget * shares.size, low, prompt_len)
        return caps.reshape(shares.shape)

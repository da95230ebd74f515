# SPDX-License-Identifier: Apache-2.0
"""Scope ``pyramid``: PyramidKV's schedule (arXiv 2406.02069), more tokens for lower layers."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from fairkv_sglang.budgets.scopes.base import SCOPES, BudgetScope
from fairkv_sglang.budgets.waterfill import IntArray
from fairkv_sglang.registry import option


@SCOPES.register
@dataclass(eq=False, kw_only=True)
class Pyramid(BudgetScope):
    """Heads of a layer keep the same; layers go down in equal steps, with any scorer.

    Beyond the window, where the mean is E = B(N) - window and M = N - window tokens compete:

        last layer  E / beta, at least the sinks (or one token)
        first layer 2 E - that; if it is above M, then M, and the last layer gets 2 E - M

    Rounded down, the missing tokens to the largest remainders, lower layers first, so that the
    mean over the layers is exactly B(N).
    """

    name: ClassVar[str] = "pyramid"
    summary: ClassVar[str] = "more in lower layers, every head of a layer the same"
    input_dependent: ClassVar[bool] = False
    spans_ranks: ClassVar[bool] = False

    beta: int = option(
        20, "Steepness: the last layer keeps 1 / beta of the mean beyond the window.", ge=1
    )

    def _expected(self, prompt_len: int) -> IntArray:
        mean, layers = self.budget(prompt_len) - self.window, len(self.layers)
        if mean <= 0 or layers == 1:
            return super()._expected(prompt_len)
        last = max(Fraction(mean, self.beta), Fraction(min(self.least - self.window, mean)))
        first = min(2 * mean - last, Fraction(prompt_len - self.window))
        last = 2 * mean - first
        exact = [first - (first - last) * Fraction(i, layers - 1) for i in range(layers)]
        kept = [int(tokens) for tokens in exact]
        order = sorted(range(layers), key=lambda i: (kept[i] - exact[i], i))
        for i in order[: mean * layers - sum(kept)]:
            kept[i] += 1
        rows = self.window + np.array(kept, dtype=np.int64)
        return np.repeat(rows[:, None], self.num_heads, axis=1)

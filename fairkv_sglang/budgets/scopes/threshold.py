# SPDX-License-Identifier: Apache-2.0
"""Scope ``threshold``: every token that scores above a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fairkv_sglang.budgets.scopes.base import SCOPES, Floored
from fairkv_sglang.budgets.selection import without_nan
from fairkv_sglang.registry import option


@SCOPES.register
@dataclass(eq=False, kw_only=True)
class Threshold(Floored):
    """A head keeps the window and what scores above ``threshold``: its floor or more, B(N) at most.

    Here the budget is a cap, so a prompt may keep less than it; one that is no longer than its
    budget is kept whole, as with any scope. Counts depend on the prompt and on nothing but the
    head's own scores. ``expected`` is the cap, which memory is admitted by.
    """

    name: ClassVar[str] = "threshold"
    summary: ClassVar[str] = "every token above a score, the budget at most"
    input_dependent: ClassVar[bool] = True
    spans_ranks: ClassVar[bool] = False

    threshold: float = option(
        0.0, "Score above which a token is kept; what is a good one depends on the scorer."
    )

    def _counts(self, layer: int, heads: Sequence[int], scores: Tensor, prompt_len: int) -> Tensor:
        above = (without_nan(scores) > self.threshold).sum(dim=1)
        beyond = self.budget(prompt_len) - self.window
        least = min(max(self.floor(prompt_len), self.least - self.window), beyond)
        return self.window + above.clamp(least, beyond)

# SPDX-License-Identifier: Apache-2.0
"""Scope ``layer``: Ada-KV over all heads of a layer of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fairkv_sglang.budgets.scopes.base import SCOPES
from fairkv_sglang.budgets.scopes.pooled import Pooled
from fairkv_sglang.budgets.waterfill import IntArray, water_fill


@SCOPES.register
@dataclass(eq=False, kw_only=True)
class Layer(Pooled):
    """Each layer keeps exactly H * B(N) tokens; its heads compete, whichever ranks they are on.

    Expected counts share out the same total by the profile's shares within each layer (equally
    without a profile); how a profile divides budget between layers is not used.
    """

    name: ClassVar[str] = "layer"
    summary: ClassVar[str] = "the best tokens of all heads of a layer"
    spans_ranks: ClassVar[bool] = True

    @property
    def group(self) -> int:
        """See the base class."""
        return self.num_heads

    def _expected(self, prompt_len: int) -> IntArray:
        budget = self.budget(prompt_len)
        if self.profile is None or budget >= prompt_len:
            return super()._expected(prompt_len)
        low = self.window + self.floor(prompt_len)
        rows = [water_fill(row, budget * self.num_heads, low, prompt_len) for row in self.shares]
        return np.stack(rows)

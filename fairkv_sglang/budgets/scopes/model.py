# SPDX-License-Identifier: Apache-2.0
"""Scope ``model``: one budget over the heads of all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fairkv_sglang.budgets.scopes.base import SCOPES, Heads
from fairkv_sglang.budgets.scopes.pooled import Pooled
from fairkv_sglang.budgets.waterfill import IntArray, water_fill


@SCOPES.register
@dataclass(eq=False, kw_only=True)
class Model(Pooled):
    """The model keeps exactly L * H * B(N) tokens; the heads of all its layers compete.

    Ada-KV's rule with the heads of all layers in place of one layer's: makes sense for scorers
    whose numbers mean the same in every layer. Tokens are selected after the last layer.

    Expected counts share out the total by the profile's shares over the model (equally without a
    profile).
    """

    name: ClassVar[str] = "model"
    summary: ClassVar[str] = "the best tokens of all heads of all layers"
    spans_ranks: ClassVar[bool] = True
    spans_layers: ClassVar[bool] = True

    @property
    def group(self) -> int:
        """See the base class."""
        return len(self.layers) * self.num_heads

    def _expected(self, prompt_len: int) -> IntArray:
        budget = self.budget(prompt_len)
        if self.profile is None or budget >= prompt_len:
            return super()._expected(prompt_len)
        shares, low = self.shares, self.window + self.floor(prompt_len)
        return water_fill(shares.ravel(), budget * shares.size, low, prompt_len).reshape(
            shares.shape
        )

    def _bound(self, prompt_len: int, heads: Heads) -> IntArray:
        most = self._most(prompt_len, sum(len(heads[layer]) for layer in self.layers))
        if self.sliding is not None:
            most += self.sliding.kept(prompt_len) * sum(len(heads[i]) for i in self.sliding.layers)
        return np.array([most], dtype=np.int64)

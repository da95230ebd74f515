# SPDX-License-Identifier: Apache-2.0
"""Load model: what a rank reads in one decode step, per layer.

cost(layer, rank) = lanes * weight slice + sum over its heads of share * batch * (expected kept
tokens * KV row + row cost). A step waits in every layer for the most loaded rank (all-reduce), so
it costs the sum over layers of the maximum over ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field

from fairkv_sglang.placement.options import FloatArray


class CostModel(BaseModel):
    """Sizes of one model and of the expected traffic; costs are in seconds or in bytes.

    A head's weight slice holds its k and v rows and the q rows and o columns of its ``group``
    query heads: (2 * group + 2) * head_dim * hidden_size parameters of ``weight_bytes`` bytes
    (0.5 for 4 bit; scales counted by a slightly larger number). A kept token is one row of K and
    one of V: 2 * head_dim * kv_bytes bytes.

    ``weight_byte_cost`` and ``kv_byte_cost`` turn bytes into cost, 1.0 each unless measured;
    ``row_cost`` is the cost of one (request, head) pair whatever its length. Prefill projects
    every prompt token for every head served, owned or not: ``prefill_weight`` decode steps'
    worth of that cost, ``prefill_tokens * prefill_token_cost`` per lane, is added, so that a
    plan for prefill-heavy traffic holds fewer copies.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    head_dim: int = Field(default=128, ge=1)
    hidden_size: int = Field(default=4096, ge=1)
    group: int = Field(default=4, ge=1)
    weight_bytes: float = Field(default=2.0, ge=0.0)
    kv_bytes: float = Field(default=2.0, gt=0.0)
    batch: float = Field(default=32.0, gt=0.0)
    weight_byte_cost: float = Field(default=1.0, ge=0.0)
    kv_byte_cost: float = Field(default=1.0, gt=0.0)
    row_cost: float = Field(default=0.0, ge=0.0)
    prefill_weight: float = Field(default=0.0, ge=0.0)
    prefill_tokens: float = Field(default=0.0, ge=0.0)
    prefill_token_cost: float = Field(default=0.0, ge=0.0)

    @property
    def slice_bytes(self) -> float:
        """Weight bytes of one lane."""
        return (2 * self.group + 2) * self.head_dim * self.hidden_size * self.weight_bytes

    @property
    def token_bytes(self) -> float:
        """KV bytes of one kept token of one head."""
        return 2 * self.head_dim * self.kv_bytes

    @property
    def lane_cost(self) -> float:
        """Cost of serving a head at all: weight slice and prefill, per decode step."""
        prefill = self.prefill_weight * self.prefill_tokens * self.prefill_token_cost
        return self.slice_bytes * self.weight_byte_cost + prefill

    def head_cost(self, loads: ArrayLike) -> FloatArray:
        """Cost of all requests of each head, ``[L, H]``, from expected kept tokens ``[L, H]``."""
        tokens = np.asarray(loads, dtype=np.float64)
        return self.batch * (tokens * self.token_bytes * self.kv_byte_cost + self.row_cost)

    def rank_cost(self, shares: FloatArray, loads: ArrayLike) -> FloatArray:
        """Cost ``[L, R]`` of shares ``[L, R, H]`` at expected kept tokens ``[L, H]``."""
        lanes = (shares > 0).sum(axis=2)
        used: FloatArray = np.einsum("lrh,lh->lr", shares, self.head_cost(loads))
        cost: FloatArray = used + self.lane_cost * lanes
        return cost

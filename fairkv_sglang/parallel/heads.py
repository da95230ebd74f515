# SPDX-License-Identifier: Apache-2.0
"""The heads of one rank: its lanes in decode, its home heads in prefill."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.placement import Plan
from fairkv_sglang.placement.homes import Homes


@dataclass(frozen=True)
class RankHeads:
    """What ``rank`` serves in decode under ``plan``, and what is at home on it.

    Attributes:
        plan: The placement of the whole model.
        rank: Tensor-parallel rank of this process.
        group_size: Query heads per KV head (g).
    """

    plan: Plan
    rank: int
    group_size: int

    @cached_property
    def heads(self) -> tuple[tuple[int, ...], ...]:
        """``[layer]`` -> KV heads in the order in which this rank holds their weights."""
        return tuple(self.plan.heads(layer, self.rank) for layer in range(self.plan.num_layers))

    @cached_property
    def lane_start(self) -> tuple[int, ...]:
        """``[L + 1]``: lanes of layer ``l`` are ``lane_start[l]:lane_start[l + 1]``."""
        return tuple(int(x) for x in self.plan.lane_start(self.rank))

    @property
    def num_lanes(self) -> int:
        """(layer, head) pairs that this rank serves, copies included."""
        return self.lane_start[-1]

    @cached_property
    def lane_layer(self) -> NDArray[np.int64]:
        """``[lanes]`` layer of each lane."""
        return np.repeat(np.arange(self.plan.num_layers), [len(row) for row in self.heads])

    @cached_property
    def lane_head(self) -> NDArray[np.int64]:
        """``[lanes]`` head of each lane."""
        return np.asarray([head for row in self.heads for head in row], dtype=np.int64)

    @cached_property
    def homes(self) -> Homes:
        """SGLang's own split, on which prompts are computed and cached."""
        return Homes(self.plan.num_kv_heads, self.plan.tp_size)

    @cached_property
    def home(self) -> tuple[int, ...]:
        """Heads at home on this rank, the same in all layers, in the order of SGLang's pool."""
        return self.homes.heads(self.rank)

    @cached_property
    def home_column(self) -> NDArray[np.int64]:
        """``[H]`` column of each head in this rank's pool, -1 where it is not at home here."""
        columns = np.full(self.plan.num_kv_heads, -1, dtype=np.int64)
        columns[list(self.home)] = np.arange(len(self.home))
        return columns

    def serves_home(self, layer: int, rank: int | None = None) -> bool:
        """Whether a rank's lanes of the layer are its home heads, whole and in their order."""
        rank = self.rank if rank is None else rank
        whole = self.homes.replicas == 1
        return whole and self.plan.heads(layer, rank) == self.homes.heads(rank)

    def owned(self, owners: NDArray[np.integer]) -> NDArray[np.uint8]:
        """``[lanes]``: 1 where ``owners [L, H]`` gives the lane's head to this rank."""
        return (owners[self.lane_layer, self.lane_head] == self.rank).astype(np.uint8)

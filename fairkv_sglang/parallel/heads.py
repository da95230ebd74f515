# SPDX-License-Identifier: Apache-2.0
"""The heads of one rank: its lanes in decode, its home heads in prefill."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.parallel.lanes import EMPTY, LaneTable
from fairkv_sglang.placement import Plan
from fairkv_sglang.placement.homes import Homes


class RankHeads:
    """What ``rank`` serves in decode, which a new plan may change, and what is at home on it.

    Args:
        plan: The placement of the whole model at start.
        rank: Tensor-parallel rank of this process.
        group_size: Query heads per KV head (g).
        table: The lane slots of all ranks; None: those that the plan fills, for good.
    """

    def __init__(
        self, plan: Plan, rank: int, group_size: int, table: LaneTable | None = None
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.group_size = group_size
        self.table = LaneTable(plan) if table is None else table
        ends = self.table.capacity[:, rank].cumsum().tolist()
        self.lane_start: tuple[int, ...] = (0, *ends)
        """``[L + 1]``: lanes of layer ``l`` are ``lane_start[l]:lane_start[l + 1]``."""
        self._lane_head = (-1, np.empty(0, dtype=np.int64))  # version of the table, heads

    @property
    def heads(self) -> tuple[tuple[int, ...], ...]:
        """``[layer]`` -> KV heads that this rank holds, in the order of its slots."""
        rows = self.table.head[:, self.rank]
        return tuple(tuple(row[row != EMPTY].tolist()) for row in rows)

    def slots(self, layer: int) -> NDArray[np.int64]:
        """Head in each slot of the layer, -1 where a slot is empty."""
        return self.table.head[layer, self.rank, : self.table.capacity[layer, self.rank]]

    @property
    def num_lanes(self) -> int:
        """Lane slots of this rank over all layers."""
        return self.lane_start[-1]

    @cached_property
    def lane_layer(self) -> NDArray[np.int64]:
        """``[lanes]`` layer of each lane."""
        return np.repeat(np.arange(self.plan.num_layers), self.table.capacity[:, self.rank])

    @property
    def lane_head(self) -> NDArray[np.int64]:
        """``[lanes]`` head of each lane, -1 where its slot is empty."""
        if self._lane_head[0] != self.table.version:
            rows = [self.slots(layer) for layer in range(self.plan.num_layers)]
            self._lane_head = (self.table.version, np.concatenate(rows))
        return self._lane_head[1]

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
        """Whether a rank's slots of the layer hold its home heads, whole, in their order."""
        rank = self.rank if rank is None else rank
        home = self.homes.heads(rank)
        row = self.table.head[layer, rank].tolist()
        whole = self.homes.replicas == 1
        return (
            whole
            and tuple(row[: len(home)]) == home
            and not any(head != EMPTY for head in row[len(home) :])
        )

    def owned(self, owners: NDArray[np.integer]) -> NDArray[np.uint8]:
        """``[lanes]``: 1 where ``owners [L, H]`` gives the lane's head to this rank."""
        heads = self.lane_head
        mine = (owners[self.lane_layer, heads] == self.rank) & (heads != EMPTY)
        return np.asarray(mine, dtype=np.uint8)

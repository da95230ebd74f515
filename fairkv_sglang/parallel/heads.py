# SPDX-License-Identifier: Apache-2.0
"""The heads of one rank: lanes, and where they stand in the plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.placement import Plan


@dataclass(frozen=True)
class RankHeads:
    """What ``rank`` serves under ``plan``.

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
    def primary(self) -> tuple[tuple[int, ...], ...]:
        """``[layer]`` -> local indices of the heads whose scores this rank contributes.

        A copied head is scored by the lowest rank that serves it, so that every rank selects from
        the same numbers.
        """
        first = self.plan.primary()
        return tuple(
            tuple(j for j, head in enumerate(row) if first[layer, head] == self.rank)
            for layer, row in enumerate(self.heads)
        )

    def layers_with_copies(self) -> frozenset[int]:
        """Layers in which this rank serves a head that another rank serves too."""
        copies = self.plan.copies()
        return frozenset(
            layer
            for layer, row in enumerate(self.heads)
            if any(len(copies[layer][head]) > 1 for head in row)
        )

    def owned(self, owners: NDArray[np.integer]) -> NDArray[np.uint8]:
        """``[lanes]``: 1 where ``owners [L, H]`` gives the lane's head to this rank."""
        return (owners[self.lane_layer, self.lane_head] == self.rank).astype(np.uint8)

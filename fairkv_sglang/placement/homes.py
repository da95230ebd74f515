# SPDX-License-Identifier: Apache-2.0
"""Homes: the rank that SGLang's own split gives a head, where its prompts are computed and cached.

Prefill runs on this split whatever the plan, so a plan does not contain it. With at least as many
heads as ranks, rank r is home to the r-th block of heads. With fewer, SGLang replicates KV heads:
a head then has several homes, each with all of its keys and values and a part of its query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


def blocks(heads: int, ranks: int) -> NDArray[np.float64]:
    """Shares ``[R, H]`` with heads in order: rank r has the r-th block, fewer heads are replicated.

    Where the counts do not divide, which SGLang refuses, blocks differ by one head (or one copy).
    """
    table = np.zeros((ranks, heads))
    most = max(heads, ranks)
    table[(np.arange(1, most + 1) * ranks - 1) // most, np.arange(most) * heads // most] = 1.0
    return np.asarray(table / table.sum(axis=0, keepdims=True))


def home_table(heads: int, ranks: int) -> NDArray[np.bool_]:
    """``[R, H]``: whether the rank is a home of the head; none is where SGLang has no split."""
    return (blocks(heads, ranks) > 0) & (heads % ranks == 0 or ranks % heads == 0)


@dataclass(frozen=True)
class Homes:
    """SGLang's split of ``num_kv_heads`` heads over ``tp_size`` ranks.

    Raises:
        ValueError: if neither number divides the other, which SGLang cannot split.
    """

    num_kv_heads: int
    tp_size: int

    def __post_init__(self) -> None:
        heads, ranks = self.num_kv_heads, self.tp_size
        if min(heads, ranks) < 1 or (heads % ranks and ranks % heads):
            raise ValueError(
                f"{heads} KV heads cannot be split over {ranks} ranks: one number must divide the "
                "other"
            )

    @property
    def per_rank(self) -> int:
        """KV heads at home on each rank."""
        return max(1, self.num_kv_heads // self.tp_size)

    @property
    def replicas(self) -> int:
        """Homes of each head; above 1 each of them has that part of its query heads."""
        return max(1, self.tp_size // self.num_kv_heads)

    def heads(self, rank: int) -> tuple[int, ...]:
        """Heads at home on ``rank``, in the order of SGLang's weights and pool."""
        first = rank // self.replicas * self.per_rank
        return tuple(range(first, first + self.per_rank))

    def ranks(self, head: int) -> tuple[int, ...]:
        """Homes of ``head``, ascending; query heads of its group are divided in this order."""
        first = head // self.per_rank * self.replicas
        return tuple(range(first, first + self.replicas))

    @cached_property
    def at_home(self) -> NDArray[np.bool_]:
        """``[R, H]``: whether the rank is a home of the head."""
        return home_table(self.num_kv_heads, self.tp_size)

    @cached_property
    def source(self) -> NDArray[np.int64]:
        """``[H, R]``: the home from which rank r gets rows of the head; r itself if it is one."""
        table = np.zeros((self.num_kv_heads, self.tp_size), dtype=np.int64)
        for head in range(self.num_kv_heads):
            ranks = self.ranks(head)
            for rank in range(self.tp_size):
                table[head, rank] = rank if rank in ranks else ranks[rank % len(ranks)]
        return table

# SPDX-License-Identifier: Apache-2.0
"""Who is where: requests on every lane of every rank, and what a decode step reads there now."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
WINDOW = 64
"""Latest decode steps of which the balance is remembered for the time when nothing runs."""


@dataclass
class _Row:
    owners: NDArray[np.integer]  # [L, H]
    lanes: IntArray  # [L, R] heads of the request on each rank whose tokens grow
    tokens: IntArray  # [L, R] kept tokens; zeros until they are known
    steps: int = 0  # decoded tokens, each of which every lane reads from then on


class Residents:
    """Requests that have owners, on all ranks; equal on all of them.

    Args:
        num_layers, ranks, num_heads: Sizes of the model and the number of ranks.
        sliding: Layers whose heads read no more tokens with each step; what they read until their
            window is full is not counted, as it is the same in all of them.
    """

    def __init__(
        self, num_layers: int, ranks: int, num_heads: int, sliding: Sequence[int] = ()
    ) -> None:
        self._sliding = list(sliding)
        self.count: IntArray = np.zeros((num_layers, ranks, num_heads), dtype=np.int64)
        """``[L, R, H]`` requests on each lane, from admission until their row is free."""
        self.reads: IntArray = np.zeros((num_layers, ranks), dtype=np.int64)
        """``[L, R]`` tokens that a decode step of the running requests reads."""
        self._rows: dict[int, _Row] = {}
        self._batch: tuple[list[int], IntArray] = ([], np.zeros_like(self.reads))
        self._history: deque[tuple[int, int]] = deque(maxlen=WINDOW)
        self._ranks = np.arange(ranks)

    def admit(self, row: int, owners: NDArray[np.integer]) -> None:
        """A request got its ``owners [L, H]``."""
        lanes = (owners[:, None, :] == self._ranks[None, :, None]).astype(np.int64)
        self.count += lanes
        per_rank = lanes.sum(axis=2)
        per_rank[self._sliding] = 0
        self._rows[row] = _Row(owners, per_rank, np.zeros_like(per_rank))

    def settle(self, row: int, kept: IntArray) -> None:
        """The prompt's ``kept [L, H]`` are known; its row decodes from now on."""
        entry = self._rows[row]
        layers = np.arange(len(kept))[:, None]
        np.add.at(entry.tokens, (layers, entry.owners.astype(np.int64)), kept)
        self.reads += entry.tokens

    def grow(self, rows: list[int]) -> None:
        """Each row decodes one more token."""
        if rows != self._batch[0]:
            lanes = np.zeros_like(self.reads)
            for row in rows:
                lanes += self._rows[row].lanes
            self._batch = (list(rows), lanes)
        self.reads += self._batch[1]
        for row in rows:
            self._rows[row].steps += 1
        fullest = int(self.reads.max(axis=1).sum())
        self._history.append((fullest, int(self.reads.sum())))

    def shrink(self, row: int, tokens: IntArray) -> None:
        """The row was compressed again: ``tokens [L, H]`` are left."""
        entry = self._rows[row]
        self.reads -= entry.tokens + entry.steps * entry.lanes
        entry.tokens[:], entry.steps = 0, 0
        self.settle(row, tokens)

    def release(self, row: int) -> None:
        """The request has left."""
        entry = self._rows.pop(row)
        layers = np.arange(len(self.reads))[:, None]
        heads = np.arange(self.count.shape[2])[None, :]
        self.count[layers, entry.owners.astype(np.int64), heads] -= 1
        self.reads -= entry.tokens + entry.steps * entry.lanes
        self._batch = ([], np.zeros_like(self.reads))  # the row may come again with other owners

    def balancedness(self) -> float:
        """Mean over max of what ranks read, over all layers: now, or at last if nothing decodes.

        1.0 is perfect; the step of a layer ends with its fullest rank.
        """
        ranks = len(self._ranks)
        fullest, total = int(self.reads.max(axis=1).sum()), int(self.reads.sum())
        if total == 0:
            fullest = sum(step[0] for step in self._history)
            total = sum(step[1] for step in self._history)
        return total / (ranks * fullest) if fullest else 1.0

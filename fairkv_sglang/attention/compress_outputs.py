# SPDX-License-Identifier: Apache-2.0
"""Heads of a request that has written its slack go back to their budgets, in place.

Before a pass, on its stream: head pages change as they do between any two steps, so a CUDA graph of
the decode step stays as it is, and steps without such a request have nothing to do. All sizes are
known on the host. The owner of a head does this alone: counts are equal on all ranks, and so are a
head's keys and queries on whichever rank it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fairkv_sglang.budgets.outputs import key_difference, score_held
from fairkv_sglang.budgets.selection import pick
from fairkv_sglang.kernels.compact import IntArray, compact, keys_of
from fairkv_sglang.kernels.prompts import to_device
from fairkv_sglang.memory.outputs import Due
from fairkv_sglang.memory.rows import RowBook

SCORED_AT_ONCE = 1 << 26
"""Bytes of attention (and of similarity) of the heads that a device scores at once."""


class OutputCompressor:
    """Compresses the requests that are due.

    Args:
        book: Rows of this rank; its outputs are bounded. Where it has the queries of the last
            tokens, their attention says what stays, else KeyDiff.
        window: Last tokens that stay in any case; those whose queries there are.
        redundancy: Weight of redundancy, see :func:`~fairkv_sglang.budgets.outputs.score_held`.
        at_once: Heads that are scored at once; None: on a CPU one, which makes a head's scores the
            same bits in any company, on a device as many as ``SCORED_AT_ONCE`` has room for.
    """

    def __init__(
        self,
        book: RowBook,
        window: int,
        redundancy: float = 0.0,
        at_once: int | None = None,
    ) -> None:
        if book.outputs is None:
            raise ValueError("the outputs of this rank's rows are not bounded")
        self.book, self.outputs, self.recent = book, book.outputs, book.recent
        self.window, self.redundancy = window, redundancy
        self._at_once = 1 if book.pages.device.type == "cpu" and at_once is None else at_once

    def step(self) -> None:
        """Before a pass: compress what reached its slack in the one before, then note what reaches
        it in this one.
        """
        for due in self.outputs.take_due():
            self._compress(due)
        self.outputs.shrink()

    def _compress(self, due: Due) -> None:
        pages, heads = self.book.pages, self.book.heads
        lanes = np.flatnonzero(self.book.owned(due.row))
        place = heads.lane_layer[lanes], heads.lane_head[lanes]
        held, counts = due.held[place], due.counts[place]
        longer = held > counts
        lanes, held, counts = lanes[longer], held[longer], counts[longer]
        if not len(lanes):
            return
        kept = torch.empty((len(lanes), int(counts.max())), dtype=torch.int64, device=pages.device)
        for part in self._parts(held):
            chosen = self._choose(due, lanes[part], held[part], counts[part])
            kept[part, : chosen.shape[1]] = chosen
        compact(pages, np.full_like(lanes, due.row), lanes, held, counts, kept)

    def _parts(self, held: IntArray) -> Iterator[slice]:
        size = self._at_once
        if size is None:
            most, queries = int(held.max()), self.window * self.book.heads.group_size
            by_row = max(queries, most if self.redundancy else 0)
            size = max(1, SCORED_AT_ONCE // (4 * most * by_row))
        for start in range(0, len(held), size):
            yield slice(start, start + size)

    def _choose(self, due: Due, lanes: IntArray, held: IntArray, counts: IntArray) -> Tensor:
        """``[n, max(counts)]`` places of what stays."""
        pages, window = self.book.pages, self.window
        keys = keys_of(pages, due.row, lanes, int(held.max()))
        ends = to_device(torch.from_numpy(held), pages.device)
        keep = to_device(torch.from_numpy(counts), pages.device)
        if self.recent is None:
            scores = key_difference(keys, ends)
        else:
            queries = self.recent.last(due.row, due.length, lanes)
            scores = score_held(queries, keys, ends, pages.head_dim**-0.5, self.redundancy)
        place = torch.arange(keys.shape[1], device=pages.device)
        first = (keep - window).clamp(max=due.first)[:, None]
        last = (place >= (ends - keep.clamp(max=window))[:, None]) & (place < ends[:, None])
        scores = scores.masked_fill((place < first) | last, torch.inf)
        return pick(scores, keep, keys.shape[1], int(counts.max())).indices

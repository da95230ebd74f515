# SPDX-License-Identifier: Apache-2.0
"""Hand-over: kept rows of a prompt go from the heads' homes to the owners' head pages.

A head whose owner is a home of it is copied out of the prefill pool into head pages. The others
travel: on a device per layer one all-to-all for all prompts that end in the pass, started when the
layer's tokens are chosen and finished a layer later, so that it runs while the next layer computes.
On CPU nothing runs beside the computation, as gloo's threads would take the core that computes, to
poll for locks that their descheduled peers hold; there each exchange is one more place where the
faster rank waits for the slower one. So as many layers as fit into a buffer share one exchange,
which is finished at once (docs/performance.md). Where no head moves, no row is communicated.

Sizes are known on the host without waiting for the device: exact on CPU and for static budgets,
else the most that each pair of ranks could have to move (docs/performance.md says what that
wastes). Inside its region a pair's rows are packed, head after head, by the counts on the device,
which sender and receiver both know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fairkv_sglang.attention.endings import Choice, Ending, IntArray, LayerRows
from fairkv_sglang.budgets import Kept
from fairkv_sglang.kernels.pages import HeadPages
from fairkv_sglang.kernels.prompts import to_device
from fairkv_sglang.parallel import RankHeads
from fairkv_sglang.parallel.lanes import EMPTY


class _Part(NamedTuple):
    """What is handed over of a layer and a prompt."""

    rows: LayerRows
    ending: Ending
    choice: Choice


@dataclass
class _Arrival:
    """Rows under way to this rank's pages: ``[rows, 2, D]``, and where each lane's rows begin."""

    work: Any  # None if the exchange is done
    rows: Tensor
    sent: Tensor  # kept alive until the exchange is done
    lanes: list[tuple[int, int, Tensor, Tensor, Tensor]]  # row, lane_lo, kept_idx, counts, columns


class HandOver:
    """Moves kept rows of one rank; see the module text.

    Args:
        heads: This rank's heads.
        pages: This rank's head pages.
        group: Process group of the ranks; None at TP 1. Where the exchange overlaps it is not the
            group of SGLang's all-reduces, which would queue up behind it.
    """

    def __init__(
        self,
        heads: RankHeads,
        pages: HeadPages,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.heads = heads
        self.pages = pages
        self.group = group
        self.overlaps = pages.device.type != "cpu"  # with the computation of the next layer
        self.rows_sent = 0  # rows of K and V that left this rank, bounds included
        self._arrival: _Arrival | None = None
        self._known = lru_cache(4096)(self._copied)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of K and one of V."""
        return 2 * self.pages.head_dim * self.pages.v_pages.element_size()

    @property
    def bytes_sent(self) -> int:
        """Bytes of kept rows that left this rank."""
        return self.rows_sent * self.row_bytes

    def forget(self) -> None:
        """Drop rows under way; a pass that failed may have left some."""
        self._arrival = None

    def moves(self, rows: LayerRows) -> bool:
        """Whether any rank needs rows of the layer from another one."""
        layer = rows.layer
        return any((e.sources[layer] != e.owners[layer]).any() for e in rows.endings)

    def most_bytes(self, rows: LayerRows) -> int:
        """Of the layer's rows, how much travels at most, between all ranks."""
        parts = zip(rows.endings, rows.choices, strict=True)
        return self.row_bytes * sum(int(self._sizes(rows, *part).sum()) for part in parts)

    def start(self, layers: Sequence[LayerRows]) -> None:
        """Send what others own, in one exchange; store what is at home here."""
        travelling = [rows for rows in layers if self.moves(rows)]
        if self.group is not None and travelling:
            self.send(travelling)
        for rows in layers:
            self._store(rows)
        if not self.overlaps:
            self.finish()

    def _store(self, rows: LayerRows) -> None:
        """Kept rows of lanes that are at home here."""
        layer, endings, choices, k_pool, v_pool, batch = rows
        lane_lo, kernels = self.heads.lane_start[layer], self.pages.kernels
        if batch is not None and kernels.prompts is not None:
            kernels.prompts.store_all_kept(
                self.pages, batch.prompts.rows, lane_lo, k_pool, v_pool, batch.prompts.slots,
                batch.indices, batch.counts, batch.columns,
            )  # fmt: skip
            return
        for ending, choice in zip(endings, choices, strict=True):
            columns = self.columns(layer, ending)
            if (columns >= 0).any():
                kernels.store_kept(
                    self.pages,
                    ending.span.row,
                    lane_lo,
                    k_pool,
                    v_pool,
                    ending.slots,
                    choice.kept.indices,
                    choice.kept.counts,
                    self._device(columns),
                )

    def send(self, layers: Sequence[LayerRows]) -> None:
        """Start the exchange of layers of which rows move; see :meth:`start`."""
        parts = [
            _Part(rows, ending, choice)
            for rows in layers
            for ending, choice in zip(rows.endings, rows.choices, strict=True)
        ]
        sizes = np.stack([self._sizes(*part) for part in parts])  # [parts, from, to]
        rank, dim = self.heads.rank, self.pages.head_dim
        outgoing, incoming = sizes[:, rank].sum(axis=0), sizes[:, :, rank].sum(axis=0)
        pool = layers[0].k_pool
        sent = pool.new_empty((int(outgoing.sum()), 2, dim))
        at = 0
        for other in range(self.heads.plan.tp_size):
            for part, of_ranks in zip(parts, sizes, strict=True):
                size = int(of_ranks[rank, other])
                if size:
                    source, ending, choice = part
                    columns = self._moving(source.layer, ending, rank, other)
                    region = sent[at : at + size]
                    self._pack(source.k_pool, source.v_pool, ending, choice.kept, columns, region)
                    at += size
        rows = pool.new_empty((int(incoming.sum()), 2, dim))
        work = dist.all_to_all_single(
            rows.view(-1).view(torch.uint8),
            sent.view(-1).view(torch.uint8),
            [int(n) * self.row_bytes for n in incoming],
            [int(n) * self.row_bytes for n in outgoing],
            group=self.group,
            async_op=self.overlaps,
        )
        self._arrival = _Arrival(work, rows, sent, self._lanes(parts, sizes[:, :, rank]))
        self.rows_sent += len(sent)

    def finish(self) -> None:
        """Store what has arrived of what was started last."""
        arrival, self._arrival = self._arrival, None
        if arrival is None:
            return
        if arrival.work is not None:
            arrival.work.wait()
        total = arrival.rows.shape[0]
        identity = torch.arange(total, device=arrival.rows.device)
        for row, lane_lo, kept_idx, counts, columns in arrival.lanes:
            k, v = (
                arrival.rows[:, part : part + 1].expand(-1, counts.shape[0], -1) for part in (0, 1)
            )
            self.pages.kernels.store_kept(
                self.pages, row, lane_lo, k, v, identity, kept_idx, counts, columns
            )

    def _device(self, values: IntArray) -> Tensor:
        """The values on the device. The same ones come again, layer by layer and prompt by prompt,
        and are copied once.
        """
        if self.pages.device.type == "cpu":
            return torch.from_numpy(values)
        return self._known(values.astype(np.int64).tobytes())

    def _copied(self, data: bytes) -> Tensor:
        values = (
            torch.frombuffer(bytearray(data), dtype=torch.int64)
            if data
            else torch.empty(0, dtype=torch.int64)
        )
        return to_device(values, self.pages.device)

    def columns(self, layer: int, ending: Ending) -> IntArray:
        """``[lanes of the layer]`` pool column of each lane that is owned and at home here."""
        heads = self.heads.slots(layer)
        owned = (ending.owners[layer][heads] == self.heads.rank) & (heads != EMPTY)
        return np.where(owned, self.heads.home_column[heads], -1)

    def _moving(self, layer: int, ending: Ending, source: int, owner: int) -> IntArray:
        """Heads that go from ``source`` to ``owner``, ascending."""
        if source == owner:
            return np.empty(0, dtype=np.int64)
        pair = (ending.sources[layer] == source) & (ending.owners[layer] == owner)
        return np.flatnonzero(pair)

    def _sizes(self, rows: LayerRows, ending: Ending, choice: Choice) -> IntArray:
        """``[R, R]`` rows that each rank sends to each other one, or the most that it could."""
        layer = rows.layer
        ranks = self.heads.plan.tp_size
        sizes = np.zeros((ranks, ranks), dtype=np.int64)
        sources, owners = ending.sources[layer], ending.owners[layer]
        moved = np.flatnonzero(sources != owners)
        if choice.exact is not None:
            np.add.at(sizes, (sources[moved], owners[moved]), choice.exact[moved])
            return sizes
        for source, owner in {(int(sources[h]), int(owners[h])) for h in moved}:
            heads = self._moving(layer, ending, source, owner).tolist()
            sizes[source, owner] = ending.scope.most(layer, ending.span.prompt_len, heads)
        return sizes

    def _pack(
        self,
        k_pool: Tensor,
        v_pool: Tensor,
        ending: Ending,
        kept: Kept,
        heads: IntArray,
        region: Tensor,
    ) -> None:
        """Rows of the heads, one head after the other, into ``region [rows, 2, D]``.

        A region that is larger than the rows is padded with rows that nobody reads.
        """
        columns = self._device(self.heads.home_column[heads])
        counts = kept.counts[columns]
        ends = counts.cumsum(0)
        at = torch.arange(region.shape[0], device=region.device)
        which = torch.searchsorted(ends, at, right=True).clamp_(max=len(heads) - 1)
        column = columns[which]
        place = (at - (ends - counts)[which]).clamp_(max=kept.indices.shape[1] - 1)
        slot = ending.slots[kept.indices[column, place].clamp_(min=0)]
        # One flat index per row: five times as fast on CPU as indexing by slot and column.
        index = slot * k_pool.shape[1] + column
        torch.index_select(k_pool.flatten(0, 1), 0, index, out=region[:, 0])
        torch.index_select(v_pool.flatten(0, 1), 0, index, out=region[:, 1])

    def _lanes(
        self, parts: Sequence[_Part], incoming: IntArray
    ) -> list[tuple[int, int, Tensor, Tensor, Tensor]]:
        """For each part where the rows of the lanes begin that get rows from other ranks.

        Args:
            parts: What is handed over.
            incoming: ``[parts, R]`` rows of each part from each rank.
        """
        # Regions come rank by rank, and part by part within.
        flat = incoming.T.ravel()
        begins = (flat.cumsum() - flat).reshape(incoming.T.shape).T
        result = []
        for (rows, ending, choice), sizes, begin in zip(parts, incoming, begins, strict=True):
            if not sizes.any():
                continue
            if choice.counts is None:
                raise RuntimeError("FairKV: rows move whose number nobody knows")
            layer = rows.layer
            order: list[int] = []  # heads in the order in which their rows come
            starts = []
            for source in np.flatnonzero(sizes).tolist():
                heads = self._moving(layer, ending, source, self.heads.rank)
                part = choice.counts[self._device(heads)]
                starts.append(part.cumsum(0) - part + int(begin[source]))
                order += heads.tolist()
            lane_heads = self.heads.slots(layer).tolist()
            columns = np.array([order.index(h) if h in order else -1 for h in lane_heads])
            counts = choice.counts[self._device(np.array(order))]
            if choice.exact is None:
                width = int(ending.scope.per_head_bound(ending.span.prompt_len)[layer].max())
            else:
                width = int(choice.exact[order].max())
            places = torch.cat(starts)[:, None] + torch.arange(width, device=counts.device)
            lane_lo, row = self.heads.lane_start[layer], ending.span.row
            result.append((row, lane_lo, places, counts, self._device(columns)))
        return result

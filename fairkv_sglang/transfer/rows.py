# SPDX-License-Identifier: Apache-2.0
"""Kept rows of a prompt, out of the head pages of one server and into those of another.

Both servers have head pages, but neither the same pages nor the same lanes: a rank of one gathers
by (layer, head, page) the heads that a rank of the other owns, and that one stores them in pages of
its own. What travels are rows, token by token, so the two may lay keys out differently.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairkv_sglang.kernels.pages import PAGE_TOKENS, HeadPages
from fairkv_sglang.kernels.prompts import to_device
from fairkv_sglang.parallel import RankHeads
from fairkv_sglang.parallel.lanes import EMPTY

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class KeptRows:
    """Kept rows of some heads of a prompt, head after head.

    Attributes:
        heads: ``[n, 2]`` layer and head of each, layers ascending.
        counts: ``[n]`` rows of each.
        k: ``[sum(counts), D]`` keys, rotary embedding applied.
        v: The same for values.
    """

    heads: IntArray
    counts: IntArray
    k: Tensor
    v: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of K and V."""
        return self.k.nbytes + self.v.nbytes


@dataclass
class Moved:
    """What a rank has sent or got so far.

    Attributes:
        prompts: Prompts of which it sent or got rows.
        bytes: Bytes of their rows, K and V.
    """

    prompts: int = 0
    bytes: int = 0

    def add(self, rows: list[KeptRows]) -> None:
        """Another prompt."""
        self.prompts += 1
        self.bytes += sum(part.bytes for part in rows)


def gather(
    pages: HeadPages, heads: RankHeads, row: int, wanted: NDArray[np.bool_], kept: IntArray
) -> KeptRows:
    """Kept rows of a prompt that are in this rank's head pages.

    Args:
        pages: This rank's head pages.
        heads: Its lanes.
        row: The prompt's row.
        wanted: ``[L, H]`` which heads; this rank owns them for the row.
        kept: ``[L, H]`` tokens that each head keeps.
    """
    layer, head = heads.lane_layer, heads.lane_head
    lanes = np.flatnonzero((head != EMPTY) & wanted[layer, head])
    counts = kept[layer[lanes], head[lanes]]
    place = np.arange(int(counts.sum())) - np.repeat(counts.cumsum() - counts, counts)
    lane, at = (
        to_device(torch.from_numpy(np.asarray(values, dtype=np.int64)), pages.device)
        for values in (np.repeat(lanes, counts), place)
    )
    page, offset = pages.page(row, lane, at // PAGE_TOKENS).long(), at % PAGE_TOKENS
    return KeptRows(
        heads=np.stack([layer[lanes], head[lanes]], axis=1).astype(np.int64),
        counts=counts.astype(np.int64),
        k=pages.keys[page, offset].reshape(-1, pages.head_dim),
        v=pages.v_pages[page, offset],
    )


def store(pages: HeadPages, heads: RankHeads, row: int, rows: KeptRows) -> None:
    """Put rows that have come into pages of this rank; those of heads that it does not own are not.

    Args:
        pages: This rank's head pages; the row owns its lanes already.
        heads: Its lanes.
        row: The prompt's row here.
        rows: What has come.
    """
    device = pages.device
    k, v = (part.to(device)[:, None] for part in (rows.k, rows.v))
    identity = torch.arange(k.shape[0], device=device)
    starts = rows.counts.cumsum() - rows.counts
    for layer in np.unique(rows.heads[:, 0]).tolist():
        here = np.flatnonzero(rows.heads[:, 0] == layer)
        counts = rows.counts[here]
        column_of = {head: column for column, head in enumerate(rows.heads[here, 1].tolist())}
        columns = np.array([column_of.get(head, -1) for head in heads.slots(layer).tolist()])
        places = starts[here][:, None] + np.arange(int(counts.max()))
        pages.kernels.store_kept(
            pages,
            row,
            heads.lane_start[layer],
            k.expand(-1, len(here), -1),
            v.expand(-1, len(here), -1),
            identity,
            *(to_device(torch.from_numpy(part), device) for part in (places, counts, columns)),
        )

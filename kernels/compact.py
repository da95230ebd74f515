# SPDX-License-Identifier: Apache-2.0
"""Head pages made shorter in place, in plain torch on any device: nothing is waited for.

Which rows stay is on the device, how many there are and how many stay the host knows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .layout import PAGE_TOKENS, PageTensors
from .prompts import to_device

IntArray = NDArray[np.int64]


def keys_of(pages: PageTensors, row: int, lanes: IntArray, held: int) -> torch.Tensor:
    """Keys ``[len(lanes), held, D]`` that the row's lanes hold, in order; more than a lane has are
    whatever stands there.
    """
    device = pages.device
    number = torch.arange(-(-held // PAGE_TOKENS), device=device)
    lane = to_device(torch.from_numpy(lanes), device)
    ids = pages.page(row, lane[:, None], number).long()
    return pages.keys[ids].reshape(len(lanes), -1, pages.head_dim)[:, :held]


def compact(
    pages: PageTensors,
    rows: IntArray,
    lanes: IntArray,
    held: IntArray,
    counts: IntArray,
    kept: torch.Tensor,
) -> None:
    """Keep ``counts[e]`` of the ``held[e]`` tokens of each (row, lane); the order stays, pages
    behind them go back to the free stack.

    Args:
        rows, lanes, held, counts: ``[E]``, no (row, lane) twice; ``held`` are its ``lens``.
        kept: int64 ``[E, width]`` on the pages' device, the first ``counts[e]`` of each ascending
            places among the held tokens; what follows is not read.
    """
    device = pages.device

    def on_device(values: IntArray) -> torch.Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(values)), device)

    entry, place = _places(np.zeros_like(counts), counts)
    row, lane, to = on_device(rows[entry]), on_device(lanes[entry]), on_device(place)
    source = kept[on_device(entry), to]
    ids = pages.page(row, lane, source // PAGE_TOKENS).long()
    to_ids = pages.page(row, lane, to // PAGE_TOKENS).long()
    for arena in (pages.keys, pages.v_pages):
        arena[to_ids, to % PAGE_TOKENS] = arena[ids, source % PAGE_TOKENS]

    # Last page first, as in a release: the next owner takes them in ascending order.
    entry, number = _places(-(-counts // PAGE_TOKENS), -(-held // PAGE_TOKENS))
    entry, number = entry[::-1].copy(), number[::-1].copy()
    freed = pages.page(on_device(rows[entry]), on_device(lanes[entry]), on_device(number))
    top = pages.free_count + torch.arange(len(entry), device=device)
    pages.free_pages[top] = freed
    pages.free_count += len(entry)
    pages.lens[on_device(rows), on_device(lanes)] = on_device(counts.astype(np.int32))


def _places(first: IntArray, end: IntArray) -> tuple[IntArray, IntArray]:
    """Every number from ``first[e]`` to below ``end[e]``, with its e."""
    counts = np.maximum(end - first, 0)
    entry = np.repeat(np.arange(len(counts)), counts)
    start = np.repeat(np.cumsum(counts) - counts, counts)
    return entry, np.arange(len(entry)) - start + first[entry]

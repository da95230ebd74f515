# SPDX-License-Identifier: Apache-2.0
"""Operations on head pages: one interface, implemented per device.

CPU tensors go to numba (`numba_cpu`), CUDA tensors to Triton (`triton_ops`); `reference` is the
torch oracle of both. Words: `bs` requests of a batch, `row` a request's row in the tables, a `lane`
is one (layer, head) that this rank serves, `n` heads of one layer, `g` query heads per KV head.

On the CPU an arena or table that would overflow raises RuntimeError and nothing is changed. Device
kernels cannot raise: they leave the affected lane as it was, give slot -1 and set a bit in
`HeadPages.error`, which `HeadPages.check_integrity` reports.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from .pages import HeadPages

logger = logging.getLogger(__name__)


def backend(device: torch.device | str) -> Any:
    """Module that implements the operations for tensors on this device."""
    kind = torch.device(device).type
    if kind == "cpu":
        from . import numba_cpu

        return numba_cpu
    if kind == "cuda":
        from . import triton_ops

        return triton_ops
    raise ValueError(f"FairKV kernels run on cpu and cuda, not on {kind}")


def set_owned(pages: HeadPages, row: int, owned: torch.Tensor) -> None:
    """At admission: which lanes this rank serves for the request in `row`.

    owned: uint8 or bool [lanes]. The row must hold no pages and must not be the padding row 0.
    """
    backend(pages.device).set_owned(pages, row, owned)


def grow(pages: HeadPages, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Make room for one token in every owned lane of every row; all layers at once.

    rows: int64 [bs], no row twice but the padding row. slots: int64 [bs, lanes], overwritten with
    the arena slot (page * 16 + offset) of the new token, -1 where the lane is not owned. Lengths
    are advanced here.
    """
    backend(pages.device).grow(pages, rows, slots)


def release(pages: HeadPages, rows: torch.Tensor) -> None:
    """Give back all pages of the rows (int64 [m]); length and ownership become 0. Idempotent."""
    backend(pages.device).release(pages, rows)


def store_kept(
    pages: HeadPages,
    row: int,
    lane_lo: int,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    token_slots: torch.Tensor,
    kept_idx: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor | None = None,
) -> None:
    """After the last chunk of a prompt, for one layer: copy the kept rows into new pages.

    The pool has m columns, the layer n lanes on this rank.

    Args:
        k_pool, v_pool: [slots, m, D] the layer's prefill pool; any strides but the last, which is
            1. All columns may be one (a stride of 0).
        token_slots: int64 [N], pool slot of each prompt position.
        kept_idx: int64 [m, most], ascending positions; what follows the first counts[c] of row c
            is not read.
        counts: int64 [m], kept tokens of each column.
        columns: int64 [n], lane lane_lo + j takes column columns[j] < m of the pools, of kept_idx
            and of counts. Several lanes may take a column, or none. None: n is m and every lane
            takes the column of its own number.

    Nothing happens for a lane that `row` does not own or whose columns[j] is negative. A column
    that no other lane takes needs no pages, and its row of kept_idx and of counts is not read.
    """
    backend(pages.device).store_kept(
        pages, row, lane_lo, k_pool, v_pool, token_slots, kept_idx, counts, columns
    )


def append(pages: HeadPages, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write the new token's K and V, [bs, n, D] each, to `slots` int64 [bs, n]; -1 is skipped."""
    backend(pages.device).append(pages, slots, k, v)


def decode(
    pages: HeadPages,
    q: torch.Tensor,
    rows: torch.Tensor,
    lane_lo: int,
    n: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attention of one layer's new tokens over lens[row, lane] cached tokens, the new one included.

    q, out: [bs, n * g, D], query heads g*h .. g*h + g - 1 belong to head h. Accumulates in
    float32. Exact zeros where the lane is not owned or empty. A (row, head) result does not depend
    on the rest of the batch on CPU.
    """
    backend(pages.device).decode(pages, q, rows, lane_lo, n, scale, out)


def snapkv_score(
    q: torch.Tensor, k: torch.Tensor, scale: float, kernel: int = 7, pooling: str = "max"
) -> torch.Tensor:
    """SnapKV's importance of each prompt token before the window (arXiv 2404.14469, section 4).

    Args:
        q: [W, n, g, D] queries of the last W tokens, with RoPE.
        k: [N, n, D] keys of the prompt.
        kernel: odd width of the pooling over neighbouring tokens; 1 = none.
        pooling: "max" or "avg".

    Returns:
        float32 [n, N - W]; higher = keep. The attention of the W rows is averaged, pooled, then
        averaged over the group.
    """
    scores: torch.Tensor = backend(q.device).snapkv_score(q, k, scale, kernel, pooling)
    return scores


def warm_up(
    dtype: torch.dtype, head_dim: int, group: int = 1, device: torch.device | str = "cpu"
) -> float:
    """Compile what serving needs before the first request; returns and logs the seconds it took."""
    start = time.perf_counter()
    pages = HeadPages.create(2, 2, 1, 1, head_dim, dtype, device)
    row = torch.ones(1, dtype=torch.int64, device=device)
    slot = torch.empty((1, 1), dtype=torch.int64, device=device)
    q = torch.ones((1, group, head_dim), dtype=dtype, device=device)
    set_owned(pages, 1, torch.ones(1, dtype=torch.uint8, device=device))
    store_kept(pages, 1, 0, q[:, :1], q[:, :1], row - 1, row[None] - 1, row)
    grow(pages, row, slot)
    append(pages, slot, q[:, :1], q[:, :1])
    decode(pages, q, row, 0, 1, 1.0, torch.empty_like(q))
    release(pages, row)
    pages.check_integrity()
    seconds = time.perf_counter() - start
    logger.info(
        "FairKV kernels ready on %s in %.1f s (%s, head dimension %d, group %d)",
        pages.device, seconds, dtype, head_dim, group,
    )  # fmt: skip
    return seconds

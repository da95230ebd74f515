# SPDX-License-Identifier: Apache-2.0
"""The operations of `interface` on CPU tensors: checks around the compiled numba kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from fairkv_sglang.kernels.interface import PromptKernels
from fairkv_sglang.kernels.layout import (
    ERROR_ROW_NOT_EMPTY,
    PADDING_ROW,
    PAGE_TOKENS,
    UNLIMITED,
    PageTensors,
    describe_error,
)

from . import attention, bookkeeping, score, simd

CODES = {torch.float32: simd.F32, torch.bfloat16: simd.BF16, torch.float16: simd.F16}
NO_SINKS = np.empty(0, np.float32)
MIN_TOKENS_PER_THREAD = 512
"""Below this many tokens per thread, handing work to another thread costs more than it saves."""


def _state(pages: PageTensors) -> tuple[Any, ...]:
    """Bookkeeping tensors as numpy arrays over the same memory, made once."""
    if pages._host is None:
        names = ("page_table", "runs", "lens", "owned", "free_pages", "free_count")
        pages._host = tuple(getattr(pages, name).numpy() for name in names)
    return pages._host  # type: ignore[no-any-return]


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"head pages: {describe_error(code)}")


def _bytes(x: torch.Tensor, what: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[int]:
    """Address and byte strides of the first two dimensions of a 3-d tensor."""
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(f"{what} must be {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}")
    row, column, inner = x.stride()
    if inner != 1 and shape[2] != 1:
        raise ValueError(f"{what} must be contiguous in its last dimension")
    size = x.element_size()
    return [x.data_ptr(), row * size, column * size]


def _arena(pages: PageTensors) -> tuple[int, int, int]:
    """Addresses of keys and values, and bytes of a row of either."""
    if not pages.by_columns:
        raise ValueError("the CPU kernels need pages that hold keys by columns")
    row_bytes = pages.head_dim * pages.v_pages.element_size()
    if row_bytes % 4:
        raise ValueError(f"the CPU kernels need rows of whole 32-bit words, not {row_bytes} bytes")
    return pages.k_pages.data_ptr(), pages.v_pages.data_ptr(), row_bytes


def set_owned(pages: PageTensors, row: int, owned: torch.Tensor, room: int = UNLIMITED) -> None:
    if row == PADDING_ROW:
        raise ValueError(f"row {PADDING_ROW} pads batches and owns no lane; use a row from 1 on")
    if bool(pages.lens[row].any()):
        _check(ERROR_ROW_NOT_EMPTY)
    pages.owned[row].copy_(owned)
    pages.room[row], pages.turn[row] = room, 0


def grow(pages: PageTensors, rows: torch.Tensor, slots: torch.Tensor) -> None:
    if slots.shape != (rows.shape[0], pages.lanes):
        want = [rows.shape[0], pages.lanes]
        raise ValueError(f"slots must be {want} (rows x lanes), got {list(slots.shape)}")
    of_rings = (pages.most.numpy(), pages.turn.numpy())
    _check(bookkeeping.grow(*_state(pages), *of_rings, rows.numpy(), slots.numpy()))


def release(pages: PageTensors, rows: torch.Tensor) -> None:
    _check(bookkeeping.release(*_state(pages), rows.numpy()))


def store_kept(
    pages: PageTensors,
    row: int,
    lane_lo: int,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    token_slots: torch.Tensor,
    kept_idx: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor | None = None,
) -> None:
    m = counts.shape[0]
    if kept_idx.shape[0] != m:
        raise ValueError(f"kept_idx must have {m} rows, one for each count: {list(kept_idx.shape)}")
    taken = np.arange(m, dtype=np.int64) if columns is None else columns.numpy()
    shape = (k_pool.shape[0], m, pages.head_dim)
    k = _bytes(k_pool, "k_pool", shape, pages.dtype)
    v = _bytes(v_pool, "v_pool", shape, pages.dtype)
    arena = _arena(pages)
    _check(
        bookkeeping.store_kept(
            *_state(pages), pages.room.numpy(), row, lane_lo, *arena, *k, *v, k_pool.shape[0],
            token_slots.numpy(), kept_idx.numpy(), counts.numpy(), taken,
        )
    )  # fmt: skip


def append(pages: PageTensors, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    shape = (*slots.shape, pages.head_dim)
    of_k = _bytes(k, "k", shape, pages.dtype)
    of_v = _bytes(v, "v", shape, pages.dtype)
    bookkeeping.append(slots.numpy(), *_arena(pages), *of_k, *of_v)


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="fairkv-decode")


@functools.cache
def _kernel(dtype: torch.dtype, group: int, dim: int) -> Callable[..., None]:
    if dtype not in CODES:
        known = ", ".join(str(d) for d in CODES)
        raise ValueError(f"CPU decode supports {known}, got {dtype}")
    if dim % 8:
        raise ValueError(f"CPU decode needs a head dimension that is a multiple of 8, got {dim}")
    return attention.kernel(CODES[dtype], group, dim)


def _parts(
    pages: PageTensors, rows: torch.Tensor, lane_lo: int, n: int
) -> Iterable[tuple[int, int]]:
    """Ranges of (request, head) items with about equal tokens, one for each thread."""
    items, threads = rows.shape[0] * n, torch.get_num_threads()
    if threads == 1 or items < 2:
        return [(0, items)]
    ends = np.cumsum(_state(pages)[2][rows.numpy(), lane_lo : lane_lo + n].ravel() + PAGE_TOKENS)
    threads = min(threads, max(1, int(ends[-1]) // MIN_TOKENS_PER_THREAD), items)
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, threads) / threads).tolist()
    return zip([0, *cuts], [*cuts, items], strict=True)


def decode(
    pages: PageTensors,
    q: torch.Tensor,
    rows: torch.Tensor,
    lane_lo: int,
    n: int,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> None:
    if n < 1 or q.shape[1] % n or not 0 <= lane_lo <= pages.lanes - n:
        last = lane_lo + n - 1
        raise ValueError(
            f"decode: {q.shape[1]} query heads over lanes {lane_lo}..{last} of {pages.lanes}"
        )
    group = q.shape[1] // n
    shape = (rows.shape[0], n * group, pages.head_dim)
    of_q = _bytes(q, "q", shape, pages.dtype)
    to, to_row, to_head = _bytes(out, "out", shape, pages.dtype)
    if to_head != pages.head_dim * out.element_size():
        raise ValueError("out must be contiguous in its last two dimensions")
    run = _kernel(pages.dtype, group, pages.head_dim)
    of_sinks = NO_SINKS if sinks is None else (sinks.float() * attention.LOG2_E).numpy()
    head = (*_state(pages)[:4], of_sinks, rows.numpy(), lane_lo, n)
    tail = (*_arena(pages)[:2], *of_q, to, to_row)
    scale = scale * attention.LOG2_E
    first, *others = _parts(pages, rows, lane_lo, n)
    if not others:
        run(*head, *first, *tail, scale)
        return
    pool = _pool(len(others))
    waiting = [pool.submit(run, *head, *part, *tail, scale) for part in others]
    run(*head, *first, *tail, scale)
    for job in waiting:
        job.result()


snapkv_score = score.snapkv_score
prompts: PromptKernels | None = None

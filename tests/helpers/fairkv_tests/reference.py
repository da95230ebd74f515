# SPDX-License-Identifier: Apache-2.0
"""Plain torch reference of every operation on head pages: slow, obvious, on any device.

It is the oracle of the tests and of the checks on a GPU. Shapes and meaning are those of
`kernels.interface`; here each operation is written in as few lines as possible, with Python loops
and host synchronisation. Where an arena or a page table would overflow it raises RuntimeError and
changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fairkv_sglang.kernels.layout import (
    ERROR_INDEX,
    ERROR_NO_FREE_PAGE,
    ERROR_ROW_FULL,
    ERROR_ROW_NOT_EMPTY,
    PAGE_TOKENS,
    RUN_PAGES,
    UNLIMITED,
    describe_error,
)
from fairkv_sglang.kernels.pages import HeadPages
from fairkv_sglang.kernels.torch_decode import decode, gather

__all__ = [
    "append",
    "decode",
    "gather",
    "grow",
    "pooled",
    "put_page",
    "release",
    "set_owned",
    "snapkv_score",
    "store_kept",
]


def _held(pages: HeadPages, row: int, lane: int) -> int:
    return -(-int(pages.lens[row, lane]) // PAGE_TOKENS)


def _pop(pages: HeadPages) -> torch.Tensor:
    pages.free_count -= 1
    return pages.free_pages[int(pages.free_count)]


def put_page(pages: HeadPages, row: int, lane: int, number: int, page: torch.Tensor | int) -> None:
    """Page ``number`` of (row, lane)."""
    if number % RUN_PAGES == 0:
        pages.page_table[row, lane, number // RUN_PAGES] = page
    first = pages.page_table[row, lane, number // RUN_PAGES].long()
    pages.runs[first, number % RUN_PAGES] = page


def _require(ok: bool, bit: int) -> None:
    if not ok:
        raise RuntimeError(f"head pages: {describe_error(bit)}")


def set_owned(pages: HeadPages, row: int, owned: torch.Tensor, room: int = UNLIMITED) -> None:
    _require(not bool(pages.lens[row].any()), ERROR_ROW_NOT_EMPTY)
    pages.owned[row] = owned.to(torch.uint8)
    pages.room[row], pages.turn[row] = room, 0


def grow(pages: HeadPages, rows: torch.Tensor, slots: torch.Tensor) -> None:
    slots.fill_(-1)
    todo = [(i, r, j) for i, r in enumerate(rows.tolist()) for j in range(pages.lanes)]
    todo = [(i, r, j) for i, r, j in todo if pages.owned[r, j]]
    full = [(i, r, j) for i, r, j in todo if 0 < pages.most[j] <= pages.lens[r, j]]
    todo = [each for each in todo if each not in full]
    new = [(r, j) for _, r, j in todo if pages.lens[r, j] % PAGE_TOKENS == 0]
    _require(len(new) <= int(pages.free_count), ERROR_NO_FREE_PAGE)
    _require(all(_held(pages, r, j) < pages.max_pages for r, j in new), ERROR_ROW_FULL)
    for i, r, j in todo:
        n = int(pages.lens[r, j])
        if n % PAGE_TOKENS == 0:
            put_page(pages, r, j, n // PAGE_TOKENS, _pop(pages))
        slots[i, j] = pages.page(r, j, n // PAGE_TOKENS) * PAGE_TOKENS + n % PAGE_TOKENS
        pages.lens[r, j] = n + 1
    for i, r, j in full:  # the oldest token makes room
        n = int(pages.turn[r, j])
        slots[i, j] = pages.page(r, j, n // PAGE_TOKENS) * PAGE_TOKENS + n % PAGE_TOKENS
        pages.turn[r, j] = (n + 1) % pages.most[j]


def release(pages: HeadPages, rows: torch.Tensor) -> None:
    for r in rows.tolist():
        for j in range(pages.lanes):
            n, top = _held(pages, r, j), int(pages.free_count)
            held = torch.arange(n, device=pages.device)
            pages.free_pages[top : top + n] = pages.page(r, j, held).flip(0)
            pages.free_count += n
        pages.lens[r] = 0
        pages.owned[r] = 0


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
    chosen = list(range(len(counts))) if columns is None else columns.tolist()
    _require(all(c < len(counts) for c in chosen), ERROR_INDEX)
    lanes = [(c, j) for j, c in enumerate(chosen, lane_lo) if c >= 0 and pages.owned[row, j]]
    need = [-(-int(counts[c]) // PAGE_TOKENS) for c, _ in lanes]
    _require(not any(pages.lens[row, j] for _, j in lanes), ERROR_ROW_NOT_EMPTY)
    _require(max(need, default=0) <= pages.max_pages, ERROR_ROW_FULL)
    if sum(need) > int(pages.room[row]):
        pages.room[row] = 0
        return
    _require(sum(need) <= int(pages.free_count), ERROR_NO_FREE_PAGE)
    pages.room[row] -= sum(need)
    for c, j in lanes:
        n = int(counts[c])
        slot = token_slots[kept_idx[c, :n].long()]
        for first in range(0, n, PAGE_TOKENS):
            page, part = _pop(pages), slot[first : first + PAGE_TOKENS]
            put_page(pages, row, j, first // PAGE_TOKENS, page)
            keys = pages.keys
            keys[page.long(), : len(part)] = k_pool[part, c].unflatten(1, keys.shape[2:])
            pages.v_pages[page.long(), : len(part)] = v_pool[part, c]
        pages.lens[row, j] = n


def append(pages: HeadPages, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    live = slots >= 0
    page, offset, keys = slots[live] // PAGE_TOKENS, slots[live] % PAGE_TOKENS, pages.keys
    keys[page, offset] = k[live].unflatten(1, keys.shape[2:])
    pages.v_pages.view(-1, pages.head_dim)[slots[live]] = v[live]


def snapkv_score(
    q: torch.Tensor, k: torch.Tensor, scale: float, kernel: int = 7, pooling: str = "max"
) -> torch.Tensor:
    rows, total = q.shape[0], k.shape[0]
    hidden = torch.ones((rows, total), dtype=torch.bool, device=q.device).triu(total - rows + 1)
    logits = torch.einsum("wngd,tnd->ngwt", q.float(), k.float()) * scale
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    attention = weights[..., : max(total - rows, 0)].mean(2)
    return pooled(attention, kernel, pooling)


def pooled(attention: torch.Tensor, kernel: int, pooling: str) -> torch.Tensor:
    """Mean over the group of ``attention [n, g, M]``, each row pooled over neighbours before."""
    if kernel > 1 and attention.shape[2]:
        pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
        attention = pool(attention, kernel, stride=1, padding=kernel // 2)
    return attention.mean(1)

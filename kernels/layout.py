# SPDX-License-Identifier: Apache-2.0
"""Tensors of one rank's compressed KV cache: head pages, page tables and the free stack.

A *head page* holds PAGE_TOKENS tokens of K (and of V) of one (request, lane); a *lane* is one
(layer, head) that this rank serves. One arena serves all layers and heads, so uneven budgets waste
at most a page per lane.

A page table has one entry for each run of 16 pages of a (row, lane): the run's first page. What
pages follow that one stands in a side array with a row for each page of the arena. So a table for
long contexts costs a sixteenth, and nobody has to allocate its parts: a run is had with its page.

Values lie in a page token by token. Keys lie *by rows* (token by token too, as FlashInfer and the
Triton kernels read them) or *by columns*: the page transposed in 32-bit words, so that the CPU
kernel finds one word of all 16 tokens side by side. :attr:`PageTensors.keys` reads and writes both.

Everything an operation changes lives in tensors of fixed shape on one
device, so that a decode step needs no host synchronisation and can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass, field
from typing import Any

import torch

PAGE_TOKENS = 16
"""Tokens per head page. Page ids are int32 and a page belongs to exactly one (row, lane)."""

RUN_PAGES = 16
"""Pages of a *run*: neighbouring pages of one (row, lane), named by the first of them."""

UNLIMITED = 1 << 62
"""Pages of a prompt that may take as many as it needs."""

PADDING_ROW = 0
"""The engine pads batches with this row: it owns no lane and never holds a page."""

# Bits of PageTensors.error, which device kernels set instead of raising.
ERROR_NO_FREE_PAGE = 1
ERROR_ROW_FULL = 2
ERROR_ROW_NOT_EMPTY = 4
ERROR_INDEX = 8

ERROR_TEXT = {
    ERROR_NO_FREE_PAGE: "no free head page (admission let in more than the arena holds)",
    ERROR_ROW_FULL: "a row needs more pages than its page table has columns",
    ERROR_ROW_NOT_EMPTY: "a row that still holds pages was given to a new request",
    ERROR_INDEX: "a row, column, token position, slot or count is out of range",
}


def describe_error(bits: int) -> str:
    """One line for the error bits of ``PageTensors.error``."""
    return "; ".join(text for bit, text in ERROR_TEXT.items() if bits & bit) or "no error"


def huge(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeroed CPU memory in huge pages where the system has them.

    The CPU's stream prefetcher stops at the border of a virtual page: decode reads about twice as
    fast from 2 MiB pages as from 4 KiB pages.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _packed(head_dim: int, dtype: torch.dtype) -> int:
    """Neighbouring numbers of a key that stay together: those of a 32-bit word."""
    return math.gcd(max(1, 4 // dtype.itemsize), head_dim)


def key_shape(
    num_pages: int, head_dim: int, dtype: torch.dtype, by_columns: bool
) -> tuple[int, ...]:
    """Shape of an arena of keys."""
    if not by_columns:
        return (num_pages, PAGE_TOKENS, head_dim)
    packed = _packed(head_dim, dtype)
    return (num_pages, head_dim // packed, PAGE_TOKENS, packed)


@dataclass
class PageTensors:
    """Arena, page tables and free stack of one rank; see the module text.

    Invariants: ``lens[row, lane]`` tokens occupy the first ``ceil(lens / 16)`` pages of
    (row, lane), of which page p is ``runs[page_table[row, lane, p // 16], p % 16]``; every page is
    either among ``free_pages[:free_count]`` or exactly one of those; entries past them are
    meaningless.

    A lane with a limit (:attr:`most`) is a ring once it is full: each token overwrites the oldest
    one. Attention does not ask in which order tokens lie, as keys carry their positions.
    """

    k_pages: torch.Tensor  # [num_pages, 16, D] model dtype, or by columns [num_pages, D/p, 16, p]
    v_pages: torch.Tensor  # [num_pages, 16, D]
    page_table: torch.Tensor  # int32 [rows, lanes, max_pages / 16], first page of each run
    runs: torch.Tensor  # int32 [num_pages, 16], pages of the run that begins with this page
    lens: torch.Tensor  # int32 [rows, lanes], tokens held
    most: torch.Tensor  # int32 [lanes], tokens that a lane ever holds; 0: as many as there come
    turn: torch.Tensor  # int32 [rows, lanes], where the next token goes in a lane that is full
    owned: torch.Tensor  # uint8 [rows, lanes], 1 where this rank serves the lane for the row
    room: torch.Tensor  # int64 [rows], pages that the row's prompt may still take
    free_pages: torch.Tensor  # int32 [num_pages], a stack
    free_count: torch.Tensor  # int64 [1], top of the stack
    error: torch.Tensor  # int32 [1], bits set by device kernels
    _host: Any = field(default=None, repr=False, compare=False)

    @property
    def num_pages(self) -> int:
        return int(self.v_pages.shape[0])

    @property
    def head_dim(self) -> int:
        return int(self.v_pages.shape[2])

    @property
    def by_columns(self) -> bool:
        """Whether pages hold keys transposed."""
        return self.k_pages.dim() == 4

    @property
    def keys(self) -> torch.Tensor:
        """View ``[num_pages, 16, D/p, p]`` of the keys, token first, however they lie in a page."""
        if self.by_columns:
            return self.k_pages.transpose(1, 2)
        return self.k_pages.unflatten(2, (-1, _packed(self.head_dim, self.dtype)))

    @property
    def rows(self) -> int:
        return int(self.lens.shape[0])

    @property
    def lanes(self) -> int:
        return int(self.lens.shape[1])

    @property
    def max_pages(self) -> int:
        """Most pages of one (row, lane)."""
        return self.max_runs * RUN_PAGES

    @property
    def max_runs(self) -> int:
        return int(self.page_table.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        return self.k_pages.dtype

    @property
    def device(self) -> torch.device:
        return self.k_pages.device

    @property
    def page_bytes(self) -> int:
        """Bytes of one head page, K and V together."""
        return 2 * PAGE_TOKENS * self.head_dim * self.k_pages.element_size()

    @property
    def num_free(self) -> int:
        """Free pages. Synchronises with the device; for idle checks and tests."""
        return int(self.free_count.item())

    @property
    def num_used(self) -> int:
        """Pages in use. Synchronises with the device; for idle checks and tests."""
        return self.num_pages - self.num_free

    def page(self, row: Any, lane: Any, number: Any) -> torch.Tensor:
        """int32 page ``number`` of (row, lane); integers or index tensors that broadcast."""
        return self.runs[self.page_table[row, lane, number // RUN_PAGES].long(), number % RUN_PAGES]

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every page is free or in exactly one table entry.

        Synchronises with the device: for idle time, start-up and tests.
        """
        bits = int(self.error.item())
        if bits:
            raise RuntimeError(f"head pages: a device kernel reported: {describe_error(bits)}")
        if bool((self.lens < 0).any()):
            raise RuntimeError("head pages: a length is negative")
        if bool((self.lens[self.owned == 0] != 0).any()):
            raise RuntimeError("head pages: a (row, lane) that this rank does not own holds tokens")
        if bool(self.owned[PADDING_ROW].any()):
            raise RuntimeError(f"head pages: padding row {PADDING_ROW} owns a lane")
        free = int(self.free_count.item())
        if not 0 <= free <= self.num_pages:
            raise RuntimeError(f"head pages: free count {free} is outside 0..{self.num_pages}")
        held = (self.lens + (PAGE_TOKENS - 1)) // PAGE_TOKENS
        if int(held.max()) > self.max_pages:
            raise RuntimeError(f"head pages: a row holds more than {self.max_pages} pages")
        number = torch.arange(self.max_runs * RUN_PAGES, device=self.device, dtype=torch.int32)
        left = (held[..., None] - number[::RUN_PAGES]).clamp(0, RUN_PAGES)  # pages of each run
        runs = self._ids(self.page_table[left > 0])
        used = self.runs[runs][number[:RUN_PAGES] < left[left > 0][:, None]]
        ids = self._ids(torch.cat([self.free_pages[:free], used]))
        times = torch.bincount(ids, minlength=self.num_pages)
        for wrong, text in ((times == 0, "is lost"), (times > 1, "has more than one holder")):
            if bool(wrong.any()):
                first = int(wrong.nonzero()[0])
                raise RuntimeError(
                    f"head pages: page {first} {text} ({int(wrong.sum())} such of "
                    f"{self.num_pages}; {free} free, {used.numel()} in tables)"
                )

    def _ids(self, pages: torch.Tensor) -> torch.Tensor:
        """int64 page ids; raises RuntimeError if there is no such page."""
        ids = pages.long()
        if bool(((ids < 0) | (ids >= self.num_pages)).any()):
            raise RuntimeError(f"head pages: a page id is outside 0..{self.num_pages - 1}")
        return ids

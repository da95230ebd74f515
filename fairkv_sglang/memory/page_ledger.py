# SPDX-License-Identifier: Apache-2.0
"""The page ledger: head pages held by every request on *every* rank.

Each tensor-parallel rank runs SGLang's scheduler for itself and must take the same decisions as
the others (DESIGN, decision 3). So each rank keeps this book for all ranks, from numbers that all
of them know: charges fixed at admission, then exact kept counts that are equal on all ranks. The
device allocator of a rank never takes more pages than its column of this book says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.kernels.pages import PAGE_TOKENS
from fairkv_sglang.model import Sliding

Pages = NDArray[np.int64]


@dataclass
class _Row:
    owners: NDArray[np.int16]  # [L, H]
    held: Pages  # [R] pages charged
    residues: Pages | None  # [16, R] lanes by (kept tokens mod 16); None until counts are known
    decoded: int = 0  # tokens appended since the prompt, or since the row was compressed again
    # With sliding windows, whose lanes stop growing: those lanes as in residues and by rank, their
    # tokens at the end of the prompt, and how many appended ones they have room for.
    rings: Pages | None = None  # [16, R]
    ring_lanes: Pages | None = None  # [R]
    ring_tokens: int = 0
    ring_room: int = 0

    @property
    def growth(self) -> Pages:
        """``[R]`` pages of the next token of a settled row."""
        assert self.residues is not None
        at = -self.decoded % PAGE_TOKENS
        pages: Pages = self.residues[at]
        if self.rings is not None and self.decoded >= self.ring_room:
            pages = pages - self.rings[at]
        return pages


class PageLedger:
    """Pages by request-table row and rank.

    Args:
        capacity: ``[R]`` head pages of each rank's arena.
        sliding: Layers whose lanes hold no more than their window.
    """

    def __init__(self, capacity: Pages, sliding: Sliding | None = None) -> None:
        self.sliding = sliding
        self.capacity = np.asarray(capacity, dtype=np.int64)
        self.held = np.zeros_like(self.capacity)
        self._rows: dict[int, _Row] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def free(self) -> Pages:
        """``[R]`` pages not charged to any request."""
        return self.capacity - self.held

    @property
    def rows(self) -> list[int]:
        """Rows that hold or reserve pages, in admission order."""
        return list(self._rows)

    def owners(self, row: int) -> NDArray[np.int16]:
        """``[L, H]`` rank that serves each head for this row."""
        return self._rows[row].owners

    def is_settled(self, row: int) -> bool:
        """True once the row's exact kept counts are known."""
        return self._rows[row].residues is not None

    def admit(self, row: int, owners: NDArray[np.int16], limit: Pages) -> None:
        """Charge the pages that a prompt may take, plus a page per lane.

        The spare page lets a request decode up to 16 tokens before its counts are known (under
        overlap scheduling the next step is chosen before the prompt's result is processed).

        Args:
            row: Request-table row.
            owners: ``[L, H]`` owner of each head.
            limit: ``[R]`` pages of which the prompt's kept tokens take no more on each rank.

        Raises:
            RuntimeError: if the row is in the book already.
        """
        if row in self._rows:
            raise RuntimeError(f"FairKV: row {row} was admitted twice")
        ranks = len(self.capacity)
        spare = np.bincount(owners.ravel(), minlength=ranks)
        held = np.asarray(limit, dtype=np.int64) + spare
        self._rows[row] = _Row(owners=owners, held=held, residues=None)
        self.held += held

    def charge(self, row: int) -> Pages:
        """``[R]`` pages charged to the row."""
        return self._rows[row].held

    def charge_more(self, row: int, pages: Pages) -> None:
        """The row's prompt may take so many more pages ``[R]``."""
        self._rows[row].held = self._rows[row].held + pages
        self.held += pages

    def pages(self, row: int, tokens: NDArray[np.integer]) -> Pages:
        """``[R]`` pages of ``tokens [L, H]`` with the row's owners."""
        pages = -(-np.asarray(tokens, dtype=np.int64) // PAGE_TOKENS)
        owners = self._rows[row].owners.ravel()
        found = np.bincount(owners, weights=pages.ravel(), minlength=len(self.capacity))
        return found.astype(np.int64)

    def settle(self, row: int, kept: NDArray[np.integer]) -> None:
        """Replace the charge by the exact pages of ``kept [L, H]`` and of the decoded tokens."""
        entry = self._rows[row]
        ranks = len(self.capacity)
        flat_owner = entry.owners.ravel().astype(np.int64)
        flat_kept = np.asarray(kept, dtype=np.int64).ravel()
        tokens = np.asarray(kept) + entry.decoded

        def residues(kept: NDArray[np.integer], owner: NDArray[np.int64]) -> Pages:
            lanes = np.bincount(
                (kept % PAGE_TOKENS) * ranks + owner, minlength=PAGE_TOKENS * ranks
            ).reshape(PAGE_TOKENS, ranks)
            return lanes

        if self.sliding is not None:
            tokens = np.minimum(tokens, self.sliding.most(len(tokens)))
            here = list(self.sliding.layers)
            of_rings, owners = np.asarray(kept)[here].ravel(), entry.owners[here].ravel()
            entry.rings = residues(of_rings, owners.astype(np.int64))
            entry.ring_lanes = entry.rings.sum(axis=0)
            entry.ring_tokens = int(of_rings[0])  # the same in all of them
            entry.ring_room = self.sliding.window - entry.ring_tokens
        exact = self.pages(row, tokens)
        self.held += exact - entry.held
        entry.held = exact
        entry.residues = residues(flat_kept, flat_owner)

    def shrink(self, row: int, tokens: NDArray[np.integer]) -> None:
        """The row holds ``tokens [L, H]`` now, its output included."""
        self._rows[row].decoded = 0
        self.settle(row, tokens)

    def growth(self, rows: list[int]) -> Pages:
        """``[R]`` new pages that one more token of each row takes."""
        need = np.zeros_like(self.capacity)
        for row in rows:
            entry = self._rows.get(row)
            if entry is not None and entry.residues is not None:
                need += entry.growth
        return need

    def growth_in_rings(self) -> Pages:
        """``[R]`` pages that lanes with a sliding window may still take, of all settled rows."""
        pages = np.zeros_like(self.capacity)
        for entry in self._rows.values():
            if self.sliding is not None and entry.ring_lanes is not None:
                held = min(entry.ring_tokens + entry.decoded, self.sliding.window)
                left = -(-self.sliding.window // PAGE_TOKENS) - -(-held // PAGE_TOKENS)
                pages += entry.ring_lanes * left
        return pages

    def can_grow(self, rows: list[int]) -> bool:
        """Whether every rank has the pages for one more token of each row."""
        return bool(np.all(self.growth(rows) <= self.free))

    def grow(self, rows: list[int]) -> None:
        """Charge one more token of each row.

        Raises:
            RuntimeError: if a rank would run out of pages, or a row outran its spare page; both
                mean that admission was wrong, and going on would corrupt the arena.
        """
        need = self.growth(rows)
        if np.any(need > self.free):
            raise RuntimeError(
                f"FairKV: head pages exhausted in decode, need {need.tolist()} "
                f"of free {self.free.tolist()} pages by rank"
            )
        for row in rows:
            entry = self._rows[row]
            if entry.residues is not None:
                more = entry.growth
                entry.held = entry.held + more
                self.held += more
            elif entry.decoded >= PAGE_TOKENS:
                raise RuntimeError(f"FairKV: row {row} decoded {entry.decoded} tokens unsettled")
            entry.decoded += 1

    def release(self, row: int) -> None:
        """Give all pages of ``row`` back; a row that holds none is ignored."""
        entry = self._rows.pop(row, None)
        if entry is not None:
            self.held -= entry.held

    def clear(self) -> None:
        """Forget every row."""
        self._rows.clear()
        self.held[:] = 0

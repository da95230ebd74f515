# SPDX-License-Identifier: Apache-2.0
"""Admission of prompts: slots of the prefill pool, and head pages of every rank.

SGLang asks a budget object how many tokens fit. Under FairKV a prompt needs two things: slots of
the prefill pool for the time of its prefill, and head pages from then on. Both are checked here;
the second against all ranks, so that the fullest one decides and all ranks decide alike.
"""

from __future__ import annotations

import numpy as np
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from fairkv_sglang.memory.admission import Asked
from fairkv_sglang.memory.page_ledger import PAGE_TOKENS, Pages
from fairkv_sglang.memory.rows import RowBook
from fairkv_sglang.patches.overrides import overrides
from fairkv_sglang.patches.request_options import asked


class FairKVPrefillBudget(PrefillBudget):  # type: ignore[misc]
    """Budget of one prefill pass.

    Head pages are asked for twice. A prompt's *charge*, of which it takes no more with its owners,
    must be free until its counts are known, a pass or two later. What *lasts* is what it is
    expected to keep by the last prompts' counts, and its output; that must fit beside the outputs
    of running requests. Either may be too low, and then a request is retracted. The room that a
    charge takes for a short time is that of outputs to come, not idle beside it.

    ``current_offset`` counts pool slots promised in this pass. ``total_offset`` is written by
    SGLang's ``PrefillAdder``: the tokens that running requests are expected to decode; here they
    are tokens of head-page growth.
    """

    def __init__(
        self, allocator: object, tree_cache: object, book: RowBook, num_mixed_decode_tokens: int = 0
    ) -> None:
        # Rows that decode inside a mixed batch take no slot of the pool.
        super().__init__(allocator, tree_cache, num_mixed_decode_tokens=0)
        self.book = book
        self.promised: Pages = np.zeros_like(book.ledger.capacity)  # charges of this pass's prompts
        if num_mixed_decode_tokens:
            # Running requests decode within this pass, without a capacity check of their own.
            self.promised = book.ledger.growth(book.ledger.rows)
        self.lasting: Pages = np.zeros_like(self.promised)  # of this pass's prompts
        self._candidate: tuple[Asked, Pages] | None = None
        self._in_rings: Pages = book.ledger.growth_in_rings()
        book.admission.begin_pass()

    def _unpromised(self) -> Pages:
        pages: Pages = self.book.ledger.free - self.promised
        return pages

    def _left(self) -> Pages:
        """Pages beside what this pass's prompts and the outputs of running requests will hold."""
        growth = self.book.demand.growth(self.total_offset, self._in_rings)
        pages: Pages = self.book.ledger.free - self.lasting - growth
        return pages

    @property
    def remaining_total(self) -> int:
        """Tokens of full KV that still fit: the smaller of pool and fullest rank."""
        pool = self._available_and_evictable() - self.current_offset
        lanes = np.maximum(self.book.demand.lanes, 1)
        return int(min(pool, int((self._left() * PAGE_TOKENS // lanes).min())))

    def has_capacity(self) -> bool:
        """Whether it is worth asking about the next request."""
        pages = np.minimum(self._unpromised(), self._left())
        return self.remaining_current > 0 and bool(np.all(pages > 0))

    def check_prefill(
        self,
        *,
        extend_input_len: int,
        total_tokens: int,
        max_new_tokens: int,
        input_tokens: int,
        chunk_limit: int | None,
        **sliding: int,
    ) -> tuple[bool, int | None]:
        """Whether a prompt of ``input_tokens`` fits; a prefix hit needs all head pages too."""
        self._candidate = None
        slots = self.ceil_paged_tokens(extend_input_len) + self.page_size
        if slots > self.remaining_current:
            return False, None
        if self.book.admission.repeats:
            return True, chunk_limit
        needs = self.book.admission.ask(input_tokens, asked())
        if np.any(needs.charge > self._unpromised()):
            return False, None
        lasting = needs.lasting(max_new_tokens)
        # Alone on the server: nothing that could leave would ever make more room.
        alone = not len(self.book.ledger) and not self.promised.any()
        if not alone and np.any(lasting > self._left()):
            return False, None
        self._candidate = needs, lasting
        return True, chunk_limit

    def available_chunk_tokens(self, chunk_limit: int) -> int:
        """Tokens for the next chunk of a prompt that already has its head pages reserved."""
        available = min(chunk_limit, int(self.remaining_current))
        return available if available > 0 else chunk_limit

    def reserve(
        self,
        extend_input_len: int,
        max_new_tokens: int,
        *,
        extra_tokens: int = 0,
        chunk_limit: int | None = None,
        is_chunked_continuation: bool = False,
    ) -> None:
        """Promise slots and pages to an admitted request."""
        self.current_offset += (
            self.ceil_paged_tokens(extend_input_len) + self.page_size + extra_tokens
        )
        if is_chunked_continuation:  # it is charged; its output comes after the last chunk
            if self.book.outputs is not None:
                max_new_tokens = self.book.outputs.growth(max_new_tokens)
            self.lasting = self.lasting + self.book.demand.growth(max_new_tokens)
        elif self._candidate is not None:
            needs, lasting = self._candidate
            self.promised = self.promised + needs.charge
            self.lasting = self.lasting + lasting
            self.book.admission.promise(needs)
            self._candidate = None


OVERRIDES = overrides(
    FairKVPrefillBudget,
    "sglang.srt.mem_cache.prefill_budget.PrefillBudget",
    {
        "remaining_total": "what is left is the smaller of pool and fullest rank",
        "has_capacity": "no more prompts are looked at when a rank has no head page left",
        "check_prefill": "a prompt needs slots for its prefill and head pages of every rank",
        "available_chunk_tokens": "a chunk needs slots alone, its head pages are reserved",
        "reserve": "two prompts of one pass must not be promised the same pages",
    },
    callers=("sglang.srt.managers.schedule_policy",),
    since="0.5.20",
    test="tests/patches/test_scheduling.py",
)

# SPDX-License-Identifier: Apache-2.0
"""SGLang's prefix caches with the hand-over: a prompt's slots go back when its prefill is done.

SGLang's bookkeeping says that a request owns the row positions ``[cache_protected_len,
kv_allocated_len)``. Once the kept tokens are in head pages we let the request own nothing:
``cache_protected_len`` follows ``kv_allocated_len`` upwards, so every release path frees nothing
and every leak check of SGLang still adds up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from fairkv_sglang.budgets import AS_SERVER, Scorer
from fairkv_sglang.memory.rows import RowBook
from fairkv_sglang.patches.ledger import verify
from fairkv_sglang.patches.overrides import overrides
from fairkv_sglang.patches.rank import this_rank
from fairkv_sglang.patches.request_options import keep_of
from fairkv_sglang.patches.spills import mark_spilled
from fairkv_sglang.patches.versions import let_go_of_prefix, storing_method, unlocking_methods

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

BACKEND_NAME = "fairkv"
# Fields that FairKV keeps on a request (``ReqKvInfo`` has slots, ``Req`` has not).
SLOTS = "fairkv_pool_slots"  # real slots of the prefill pool behind the row, [0, n)
HANDED_OVER = "fairkv_handed_over"  # the slots went back, only head pages remain
EVERYTHING = 1 << 40  # tokens, more than any prompt has


def tail(scorer: Scorer) -> int:
    """Last tokens of a prompt that are computed in any case, for the scorer to have queries of."""
    return EVERYTHING if scorer.observes else scorer.window


def ceil_page(length: int, page_size: int) -> int:
    """Smallest multiple of ``page_size`` that is not below ``length``."""
    return -(-length // page_size) * page_size


def owns_nothing(req: Req, page_size: int) -> None:
    """Keep the request's own range empty after its lengths changed."""
    req.kv.cache_protected_len = ceil_page(req.kv.kv_allocated_len, page_size)


class FairKVRadixCache(UnifiedRadixCache):  # type: ignore[misc]
    """SGLang's cache, with the hand-over; see the module's docstring for the idea.

    The prompt stays in the tree, evictable, without its request's lock. Without prefix caching
    (``--disable-radix-cache``) SGLang's class is told so and keeps nothing.

    Args:
        params: SGLang's.
        book: Rows of this rank.
        window: Last tokens of a prompt whose queries the scorer needs; EVERYTHING: of all.
    """

    def __init__(self, params: Any, *, book: RowBook, window: int) -> None:
        self.book, self.window = book, window
        self._storing = False
        self.repeated = 0  # tokens behind the prompt of the request that SGLang asks for now
        super().__init__(params)

    def cache_unfinished_req(self, req: Req, chunked: bool = False, **kwargs: Any) -> None:
        """SGLang up to 0.5.21: cache a prompt, and after its last chunk give its slots back."""
        with self._stores():
            super().cache_unfinished_req(req, chunked=chunked, **kwargs)
        if not chunked:
            self._hand_over(req)

    def checkpoint(self, req: Req, *, up_to: int, **kwargs: Any) -> None:
        """SGLang from 0.5.22 on: the same; also called for what a request leaves at its end."""
        with self._stores():
            super().checkpoint(req, up_to=up_to, **kwargs)
        if not req.finished() and up_to >= len(req.full_untruncated_fill_ids):
            self._hand_over(req)

    @contextmanager
    def _stores(self) -> Iterator[None]:
        """SGLang looks up what it has just stored."""
        self._storing = True
        try:
            yield
        finally:
            self._storing = False

    def match_prefix(self, params: Any) -> Any:
        """A request's own scorer may need the queries of more tokens than the server's."""
        keep = AS_SERVER if params.req is None else keep_of(params.req)
        if keep.scorer is not None and not self._storing:
            key = params.key
            computed = max(len(key.token_ids) - tail(keep.scorer), 0)
            key.limit = computed if key.limit is None else min(key.limit, computed)
        return super().match_prefix(params)

    def _hand_over(self, req: Req) -> None:
        row, slots = req.kv.req_pool_idx, getattr(req, SLOTS)
        if self.book.hand_over(row, slots):
            mark_spilled(req)
        # Only real slots, never past them: under overlap a decode step was added already.
        self.free_kv_row(req.kv, [(req.kv.cache_protected_len, slots)])
        let_go_of_prefix(self, req)
        # The whole row: positions past the prompt still show slots of the row's former owner.
        self.req_to_token_pool.req_to_token[row] = 0
        owns_nothing(req, self.page_size)
        setattr(req, HANDED_OVER, True)
        # Output tokens have no full KV, so nothing may be inserted at finish.
        req.skip_radix_cache_insert = True

    def dec_lock_ref(self, node_id: Any, params: Any = None, *rest: Any, **named: Any) -> Any:
        """SGLang up to 0.5.21: there is no receipt to give where prefix caching is off."""
        return super().dec_lock_ref(node_id, params, *rest, **named)

    def claim_kv_row(self, req: Req) -> bool:
        """First call of every release: forget positions that never had a slot."""
        slots = getattr(req, SLOTS, None)
        if getattr(req, HANDED_OVER, False):
            req.kv.kv_allocated_len = req.owned_kv_len()
            owns_nothing(req, self.page_size)
        elif slots is not None and req.kv.kv_allocated_len > slots:
            req.kv.kv_allocated_len = slots
            req.kv.kv_committed_len = min(req.kv.kv_committed_len, slots)
        return bool(super().claim_kv_row(req))

    def on_release(self, req: Req, **kept: bool) -> None:
        """The row is free: a retracted request starts anew."""
        super().on_release(req, **kept)
        if getattr(req, HANDED_OVER, False):
            setattr(req, HANDED_OVER, False)
            req.skip_radix_cache_insert = False
        setattr(req, SLOTS, None)

    def swa_reprefill_tail_tokens(self, *request: Any) -> int:
        """Caps a prefix hit so that the observation window is always recomputed.

        SGLang has this for sliding windows; window scorers need the same: the queries of the last
        tokens of the prompt must exist. For scorers that observe all queries nothing is reused. A
        pass that repeats its prompt computes all that it repeats.
        """
        tail = int(super().swa_reprefill_tail_tokens(*request))
        return max(tail, self.window, self.repeated)


def build_prefix_cache(context: Any) -> Any:
    """Factory for SGLang's radix-cache registry (``--radix-cache-backend fairkv``).

    Raises:
        HookError: if a hook did not take effect in this process.
    """
    from sglang.srt.mem_cache.registry import create_unified_radix_cache

    verify()
    rank = this_rank()
    ours = partial(FairKVRadixCache, book=rank.book, window=tail(rank.scorer))
    return create_unified_radix_cache(context, cache_class=ours)


OVERRIDES = overrides(
    FairKVRadixCache,
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache",
    {
        storing_method(): "the slots of a prompt go back when its last chunk has run",
        "match_prefix": "a request's own scorer may need more recomputed than the server's",
        **dict.fromkeys(unlocking_methods(), "admission without prefix caching gives no receipt"),
        "claim_kv_row": "a released row must not free positions that never had a slot",
        "on_release": "a retracted request starts anew",
        "swa_reprefill_tail_tokens": "the observation window is recomputed in a prefix hit",
    },
    callers=(
        "sglang.srt.mem_cache.common",
        "sglang.srt.managers.schedule_policy",
        "sglang.srt.managers.schedule_batch",
    ),
    since="0.5.20",
    test="tests/engine/test_memory.py",
)

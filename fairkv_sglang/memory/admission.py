# SPDX-License-Identifier: Apache-2.0
"""What a prompt needs if it is admitted now: its owners, and pages on every rank.

Who asks gets the owners that the prompt will have, so that a copied head counts on one rank. All
prompts of a pass are asked about before the first of them is admitted: those that were promised
their pages keep the owners with which they were.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.budgets import AS_SERVER, BudgetScope, Keep
from fairkv_sglang.memory.demand import PageDemand
from fairkv_sglang.memory.forecast import LEAST_SEEN, forecast_pages
from fairkv_sglang.memory.outputs import OutputBound, OutputRule
from fairkv_sglang.memory.page_ledger import PAGE_TOKENS, Pages
from fairkv_sglang.placement import Router
from fairkv_sglang.profiles.recorder import Recorder

LEAST_RECORDED = 4
"""Prompts from which on a new one's kept tokens are expected to be like those of the last ones."""


@dataclass(frozen=True)
class Asked:
    """A prompt's needs, the same on all ranks.

    Attributes:
        prompt_len: Its tokens.
        owners: ``[L, H]`` rank that serves each head for it.
        expected: ``[L, H]`` tokens that it is expected to keep.
        bound: ``[R]`` pages that its kept tokens cannot exceed.
        limit: ``[R]`` pages that they are charged, at most ``bound``.
        lanes: ``[R]`` heads that it has on each rank.
        keep: What it wants kept.
        outputs: What it may hold while it writes; None: all of its output.
        most: ``[L, 1]`` tokens that a head ever holds, where there are sliding windows.
    """

    prompt_len: int
    owners: NDArray[np.int16]
    expected: NDArray[np.number]
    bound: Pages
    limit: Pages
    lanes: Pages
    keep: Keep = AS_SERVER
    outputs: OutputBound | None = None
    most: NDArray[np.int64] | None = None

    @property
    def charge(self) -> Pages:
        """``[R]`` pages that the ledger charges until its counts are known."""
        pages: Pages = self.limit + self.lanes
        return pages

    def lasting(self, output: int) -> Pages:
        """``[R]`` pages that it is expected to hold at most, writing ``output`` tokens."""
        if self.outputs is not None:
            tokens = np.minimum(self.expected + output, self.outputs.most(self.expected))
            each = np.ceil(tokens / PAGE_TOKENS)
        else:
            each = np.ceil(self.expected / PAGE_TOKENS) + -(-output // PAGE_TOKENS)
        if self.most is not None:
            each = np.minimum(each, -(-self.most // PAGE_TOKENS))
        owners = self.owners.ravel()
        pages = np.bincount(owners, weights=each.ravel(), minlength=len(self.lanes))
        lasting: Pages = pages.astype(np.int64)
        return lasting


class Admission:
    """Asks for prompts, and keeps what was promised until they are admitted.

    Args:
        scope: Budget scope.
        demand: Page bounds.
        router: Chooses owners of copied heads.
        recorder: Kept tokens of the last prompts.
        forecast_factor: For tests: forecasts are taken times this.
        outputs: When outputs are compressed; None: never.
    """

    def __init__(
        self,
        scope: BudgetScope,
        demand: PageDemand,
        router: Router,
        recorder: Recorder,
        forecast_factor: float = 1.0,
        outputs: OutputRule | None = None,
    ) -> None:
        self._outputs = outputs
        self._scope, self._demand = scope, demand
        self._router, self._recorder = router, recorder
        self._factor = forecast_factor
        sliding = scope.sliding
        self._most = None if sliding is None else sliding.most(scope.num_layers)
        self.certain = False
        """Whether who is asked about next has to stay within its charge, whatever it keeps."""
        self.repeats = False
        """Whether who is asked about next only repeats its prompt, and takes no head pages."""
        self._promised: deque[tuple[int, Asked]] = deque()
        self._keys = count(-1, -1)  # of promised prompts in the router; rows are positive

    def ask(self, prompt_len: int, keep: Keep = AS_SERVER) -> Asked:
        """What a prompt of ``prompt_len`` tokens needs; nothing is remembered."""
        scope = keep.scope(self._scope, prompt_len)
        expected = self._expected(scope, prompt_len, keep)
        owners = self._router.choose(expected)
        bound = self._demand.with_owners(prompt_len, owners, scope)
        certain = self.certain or keep.has_method
        limit = bound if certain else self._limit(scope, prompt_len, owners, bound)
        lanes = np.bincount(owners.ravel(), minlength=len(bound))
        outputs = self._outputs.bound(prompt_len, keep) if self._outputs else None
        return Asked(prompt_len, owners, expected, bound, limit, lanes, keep, outputs, self._most)

    def ask_kept(self, prompt_len: int, kept: NDArray[np.integer], keep: Keep = AS_SERVER) -> Asked:
        """The same for a prompt that comes from another server with ``kept [L, H]`` tokens."""
        owners = self._router.choose(kept)
        lanes = np.bincount(owners.ravel(), minlength=len(self._demand.lanes))
        pages = np.bincount(
            owners.ravel(), weights=-(-kept.ravel() // PAGE_TOKENS), minlength=len(lanes)
        ).astype(np.int64)
        return Asked(prompt_len, owners, kept, pages, pages, lanes, keep)

    def promise(self, asked: Asked) -> None:
        """The prompt is in the pass that is being put together."""
        key = next(self._keys)
        self._router.admit(key, asked.expected, asked.owners)
        self._promised.append((key, asked))

    def begin_pass(self) -> None:
        """Another pass is put together: promises of one that never came are void."""
        for key, _ in self._promised:
            self._router.release(key)
        self._promised.clear()

    def take(self, row: int, prompt_len: int, keep: Keep = AS_SERVER) -> Asked:
        """The next prompt has its row: what it was promised, or what it needs now.

        Raises:
            RuntimeError: if another prompt was promised, which means that going on would hand out
                pages twice.
        """
        if not self._promised:
            self.promise(self.ask(prompt_len, keep))
        key, asked = self._promised.popleft()
        if (asked.prompt_len, asked.keep) != (prompt_len, keep):
            raise RuntimeError(
                f"FairKV: row {row} has a prompt of {prompt_len} tokens, the next one that was "
                f"promised its pages has {asked.prompt_len} ({keep}, {asked.keep})"
            )
        self._router.rename(key, row)
        return asked

    def _limit(
        self, scope: BudgetScope, prompt_len: int, owners: NDArray[np.int16], bound: Pages
    ) -> Pages:
        """``[R]`` the smaller of bound and forecast."""
        if not scope.input_dependent or scope.budget(prompt_len) >= prompt_len:
            return bound
        seen = self._recorder.compressed(None if self._most is None else scope.layers)
        if len(seen) < LEAST_SEEN:
            return bound
        pages = forecast_pages(scope, seen, prompt_len, owners, len(bound))
        limit: Pages = np.minimum(bound, (pages * self._factor).astype(np.int64))
        return limit

    def _expected(self, scope: BudgetScope, prompt_len: int, keep: Keep) -> NDArray[np.number]:
        """``[L, H]`` tokens that a prompt is expected to keep: each budget's by the last prompts.

        What they tell is told of the server's scorer and scope.
        """
        expected = scope.expected(prompt_len)
        known = not scope.input_dependent or scope.budget(prompt_len) >= prompt_len
        if known or keep.has_method or self._recorder.prompts < LEAST_RECORDED:
            return expected
        seen = self._recorder.mean().reshape(scope.budgets, -1)
        total = expected.reshape(scope.budgets, -1).sum(axis=1, keepdims=True)
        shared: NDArray[np.number] = total * (seen / seen.sum(axis=1, keepdims=True))
        return shared.reshape(expected.shape)

# SPDX-License-Identifier: Apache-2.0
"""Passes that repeat a waiting request's prompt, for scorers that ask for them: batched and chunked
as SGLang does with any prompt.

Such a pass is the request's own: SGLang admits it with the prompt, an instruction and a chunk of
the prompt as its tokens. It takes slots of the prefill pool, like any prompt, and no head pages.
When it is launched the request counts as retracted, so SGLang drops the token that it gives. Before
the next pass is put together the request's row is freed, with the prompt left in the prefix cache,
and the request waits in front of the others. When all chunks were repeated it is admitted as
itself, with its prompt cached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairkv_sglang.attention.forward_spans import CONTEXT, REPEAT
from fairkv_sglang.budgets import BudgetScope, Keep, Scorer
from fairkv_sglang.budgets.repeats import Wording
from fairkv_sglang.memory.contexts import Context, Contexts, Repeat
from fairkv_sglang.patches.versions import keep_prefix

_LOGPROBS = "fairkv_logprobs"  # what a request asks for, while its prompt is repeated


def repeat_of(req: Any) -> Repeat | None:
    """The pass that repeats the request's prompt, if its next or current pass does."""
    repeat: Repeat | None = getattr(req, REPEAT, None)
    return repeat


class Repeats:
    """Decides which requests repeat their prompts; the same on every rank.

    Args:
        scorer: The scorer.
        scope: The server's budget scope.
        keep_of: What a request of SGLang's wants kept.
        wording: Tokens around a chunk.
        contexts: Prompts that were repeated.
    """

    def __init__(
        self,
        scorer: Scorer,
        scope: BudgetScope,
        keep_of: Callable[[Any], Keep],
        wording: Wording,
        contexts: Contexts,
    ) -> None:
        self.scorer, self.scope, self.wording, self.contexts = scorer, scope, wording, contexts
        self._keep_of = keep_of
        self._busy: dict[Context, Any] = {}  # whose request repeats it in the pass that is planned
        self._launched: list[Any] = []  # requests whose passes ran last

    # -- what is needed -------------------------------------------------------------------------

    def needed(self, req: Any, length: int) -> bool:
        """Whether a request's prompt is compressed at all if it has ``length`` tokens, and by this
        scorer.
        """
        keep = self._keep_of(req)
        if keep.scorer not in (None, self.scorer):
            return False
        budget = keep.scope(self.scope, length).budget(length)
        return self.scorer.window < length and budget < length

    def most_tokens(self, room: int) -> int:
        """Longest prompt that can be repeated where a pass may have ``room`` tokens."""
        left = room - self.wording.longest
        return max(left - self.scorer.chunk, min(left // 2, self.scorer.chunk))

    # -- putting a pass together ----------------------------------------------------------------

    def begin_pass(self, chunked: Any) -> None:
        """Another pass is put together, in which ``chunked`` (or None) goes on."""
        repeat = None if chunked is None else repeat_of(chunked)
        self._busy = {} if repeat is None else {repeat.context: chunked}

    def decide(self, req: Any) -> None:
        """Whether a waiting request's next pass repeats its prompt, and which chunk."""
        self._show_logprobs(req)
        setattr(req, REPEAT, None)
        context = self._context(req)
        setattr(req, CONTEXT, context)
        if context is None or context.complete:
            return
        if self._busy.setdefault(context, req) is req:
            setattr(req, REPEAT, context.next(self.wording))
            self._hide_logprobs(req)

    def waits(self, req: Any) -> bool:
        """Whether another request is repeating the same prompt."""
        context: Context | None = getattr(req, CONTEXT, None)
        return context is not None and not context.complete and repeat_of(req) is None

    def _context(self, req: Any) -> Context | None:
        length = len(req.origin_input_ids) + len(req.output_ids)
        if not self.needed(req, length):
            return None
        own: Context | None = getattr(req, CONTEXT, None)
        # A request that comes back has output behind its prompt: none of it needs scores that is in
        # the window, or that pushes nothing but scored tokens out of it.
        if own is not None and 0 <= length - len(own.tokens) <= self.scorer.window:
            return own
        tokens = req.origin_input_ids + req.output_ids
        namespace = req.extra_key, req.cache_salt
        return self.contexts.get(tokens, namespace, self.wording, self.scorer.chunk)

    # -- running it -----------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether the last pass repeated a prompt, so that requests have to be taken out."""
        return bool(self._launched)

    def launched(self, plan: Any, chunked: Any) -> None:
        """A pass is put together and will run."""
        batch = plan.batch_to_run
        for req in () if batch is None else batch.reqs:
            repeat = repeat_of(req)
            if repeat is not None and req is not chunked:
                req.is_retracted = True
                self.contexts.launched(repeat)
                self._launched.append(req)

    def take_out(self, running: Any) -> list[Any]:
        """Take requests whose prompts were repeated out of SGLang's running batch.

        Returns:
            Those; they wait nowhere yet.
        """
        if not self._launched:
            return []
        launched, self._launched = self._launched, []
        kept, taken = [], []
        for index, req in enumerate(running.reqs):
            if req.kv.holds_kv and any(req is each for each in launched):
                length = len(req.origin_input_ids) + len(req.output_ids)
                # With chunks the prompt may be in the tree already, with a part of what follows it.
                if req.kv.cache_protected_len < length and not req.skip_radix_cache_insert:
                    keep_prefix(running.tree_cache, req, length)
                running.release_req(index, 0)
                req.retraction_count -= 1  # nobody took anything away from it
                taken.append(req)
            else:
                kept.append(index)
        running.filter_batch(keep_indices=kept)
        return taken

    def put_back(self, scheduler: Any, taken: list[Any]) -> None:
        """They wait in front of the others, but for those that were aborted meanwhile."""
        from sglang.srt.managers.io_struct import AbortReq

        scheduler.waiting_queue = taken + scheduler.waiting_queue
        for req in taken:
            if req.to_finish is not None:
                reason = req.to_finish.to_json()
                scheduler.abort_request(AbortReq(rid=req.rid, finished_reason=reason))

    def _hide_logprobs(self, req: Any) -> None:
        """The tokens behind a prompt have log-probabilities that nobody asked for."""
        setattr(req, _LOGPROBS, (req.return_logprob, req.logprob_start_len))
        req.return_logprob, req.logprob_start_len = False, -1

    def _show_logprobs(self, req: Any) -> None:
        asked = getattr(req, _LOGPROBS, None)
        if asked is not None:
            req.return_logprob, req.logprob_start_len = asked
            setattr(req, _LOGPROBS, None)

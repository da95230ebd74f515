# SPDX-License-Identifier: Apache-2.0
"""What a request wants kept, where ranks decide about it; and the answer if that can never fit.

SGLang asks its allocator and its prefill budget for room without naming the request, so hooks
around the two functions that know it say whose turn it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

from fairkv_sglang.budgets import AS_SERVER, BudgetSpec, Keep
from fairkv_sglang.config.request_options import KEY, keep_of_text
from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.patches.rank import this_rank

_asked = AS_SERVER
_read = lru_cache(4096)(keep_of_text)


def keep_of(req: Any) -> Keep:
    """What one of SGLang's requests wants kept; it goes with it through retractions."""
    given = req.sampling_params.custom_params
    text = given.get(KEY) if isinstance(given, dict) else None
    return AS_SERVER if text is None else _read(text)


@contextmanager
def asking(keep: Keep) -> Iterator[None]:
    """SGLang asks for room for a request that wants this kept."""
    global _asked
    before, _asked = _asked, keep
    try:
        yield
    finally:
        _asked = before


def asked() -> Keep:
    """What the request wants kept for which SGLang asks."""
    return _asked


def around_init_max_new_tokens(original: Any, scheduler: Any, req: Any) -> None:
    """A request has come: clip its output by what it wants kept; one that never fits gets 400."""
    keep = keep_of(req)
    if problem := not_served(keep):
        req.set_finish_with_abort(problem)
    prompt_len, ended = len(req.origin_input_ids), req.to_finish
    with asking(keep):
        original(scheduler, req)
    if req.to_finish is not ended and keep != AS_SERVER:
        allocator = scheduler.token_to_kv_pool_allocator
        problem = never_fits(allocator, keep, prompt_len)
        if problem is not None:
            req.set_finish_with_abort(problem)


def not_served(keep: Keep) -> str | None:
    """One line on a scorer that this model, or this number of ranks, does not allow."""
    rank, scorer = this_rank(), keep.scorer
    if scorer is None:
        return None
    if scorer.needs_rope and rank.backend.compressor.rope is None:
        why = "needs one table of rotary embeddings, which this model has not"
    elif not scorer.averages_group and rank.heads.homes.replicas > 1:
        why = "with these options needs all query heads of a KV head on one rank"
    elif scorer.repeats and scorer != rank.scorer:
        why = "has prompts repeated, which needs a server that has it, with the same options"
    elif scorer.reads_hidden and scorer.name != rank.scorer.name:
        why = "has weights of its own, which needs a server that was started with it"
    else:
        return None
    return f"fairkv.scorer: {scorer.name} {why}; {rank.scorer.name} will do."


def never_fits(allocator: Any, keep: Keep, prompt_len: int) -> str | None:
    """One line on a prompt whose own options ask for too much, with the most that fits.

    None if it is not a matter of its options.
    """
    server = this_rank().scope

    def fits(tokens: int) -> bool:
        with asking(replace(keep, spec=BudgetSpec(tokens))):
            most = allocator.max_new_tokens_for_memory(
                prompt_len, 1, token_capacity=0, sliding_window_size=None, chunk_size=None
            )
        return bool(most)  # with a token of output

    scope = keep.scope(server, prompt_len)
    # The least that a request may ask for is raised to hold its protected tokens.
    wanted, low = scope.budget(prompt_len), scope.least - scope.protected
    said = f"fairkv: the options of this request keep {wanted} of {prompt_len} tokens in each head"
    if scope.protected:
        said += f", {scope.protected} of them protected"
    if low >= wanted or not fits(low):
        return f"{said}, which this server has no room for." if keep.spans else None
    high = wanted  # does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return f"{said}; this server has room for a budget of {low} at most."


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
        kind="around",
        function=around_init_max_new_tokens,
        why="a request with a budget of its own is clipped by that, or answered that it cannot fit",
        since="0.5.17",
        upstream="sglang/srt/managers/scheduler.py",
        test="tests/patches/test_request_options.py",
    ),
)

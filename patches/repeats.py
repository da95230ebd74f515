# SPDX-License-Identifier: Apache-2.0
"""Hooks for scorers that have prompts repeated: what SGLang sees of a request meanwhile
(``repeating.py``), and which prompts cannot be.
"""

from __future__ import annotations

from typing import Any

from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.patches.rank import this_rank
from fairkv_sglang.patches.repeating import repeat_of


def around_init_next_round(
    original: Any, req: Any, tree_cache: Any = None, *args: Any, **kwargs: Any
) -> None:
    """SGLang looks what of a request is cached: for a pass that repeats its prompt, what stands
    behind the prompt is among its tokens, and is computed even if it is cached.

    Without a cache it is the next chunk of a request that goes on with what it has begun.
    """
    repeats = this_rank().repeats
    if repeats is not None and tree_cache is not None:
        repeats.decide(req)
    repeat = repeat_of(req)
    if repeat is None:
        original(req, tree_cache, *args, **kwargs)
        return
    prompt, output = req.origin_input_ids, req.output_ids
    req.origin_input_ids, req.output_ids = prompt + output + repeat.tokens, output[:0]
    # SGLang keeps them while their number is right; those of another chunk may be as many.
    req.full_untruncated_fill_ids = output[:0]
    if tree_cache is not None:
        tree_cache.repeated = len(repeat.tokens)
    try:
        original(req, tree_cache, *args, **kwargs)
    finally:
        req.origin_input_ids, req.output_ids = prompt, output
        if tree_cache is not None:
            tree_cache.repeated = 0


def before_stream_output(
    streamer: Any, reqs: list[Any], *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A request whose prompt was repeated has nothing to say, not even an empty output."""
    if all(repeat_of(req) is None for req in reqs):
        return None
    return (streamer, [req for req in reqs if repeat_of(req) is None], *args), kwargs


def after_init_max_new_tokens(_: None, scheduler: Any, req: Any) -> None:
    """A request has come: clip its output so that it can be repeated also with all of that behind
    its prompt, as after a retraction; a prompt that cannot be repeated gets 400.
    """
    rank, prompt_len = this_rank(), len(req.origin_input_ids)
    repeats = rank.repeats
    if repeats is None or not repeats.needed(req, prompt_len):
        return
    page = scheduler.token_to_kv_pool_allocator.page_size
    most = repeats.most_tokens(min(scheduler.max_req_len, rank.division.pool_tokens - page) - 1)
    if prompt_len >= most:  # and a token of output
        req.set_finish_with_abort(
            f"fairkv: scorer {repeats.scorer.name} repeats prompts in chunks of "
            f"{repeats.scorer.chunk} tokens; "
            f"this one has {prompt_len}, and this server has room for {max(most - 1, 0)} at most, "
            'or for more with {"compress": false}.'
        )
        return
    parameters = req.sampling_params
    parameters.max_new_tokens = min(parameters.max_new_tokens, most - prompt_len)
    parameters.min_new_tokens = min(parameters.min_new_tokens, parameters.max_new_tokens)


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.schedule_batch.Req.init_next_round_input",
        kind="around",
        function=around_init_next_round,
        why="a request's prompt is repeated in passes of its own before it is compressed",
        since="0.5.17",
        upstream="sglang/srt/managers/schedule_batch.py",
        test="tests/engine/test_kvzip.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
        kind="after",
        function=after_init_max_new_tokens,
        why="a prompt and what repeats it must fit into the model's positions and the prefill pool",
        since="0.5.17",
        upstream="sglang/srt/managers/scheduler.py",
        test="tests/engine/test_kvzip.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.output_streamer."
        "SchedulerOutputStreamer.stream_output",
        kind="before",
        function=before_stream_output,
        why="a client would get an empty output when its prompt has been repeated",
        since="0.5.21",
        upstream="sglang/srt/managers/scheduler_components/output_streamer.py",
        test="tests/engine/test_kvzip.py",
    ),
)

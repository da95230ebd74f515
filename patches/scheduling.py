# SPDX-License-Identifier: Apache-2.0
"""Hooks on allocation and admission: decode takes no slot, head pages decide who runs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from fairkv_sglang.budgets import Keep
from fairkv_sglang.kernels.pages import PAGE_TOKENS
from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.patches.rank import Rank, this_rank
from fairkv_sglang.patches.repeating import repeat_of
from fairkv_sglang.patches.request_options import asked, asking, keep_of
from fairkv_sglang.patches.spills import has_spilled, retract_spilled
from fairkv_sglang.patches.versions import forgets_preempted


def after_alloc_for_extend(result: Any, batch: Any) -> None:
    """A prompt (or its next chunk) got its slots: fix owners, charge its head pages."""
    from fairkv_sglang.patches.prefix_cache import HANDED_OVER, SLOTS

    book = this_rank().book
    for req in batch.reqs:
        setattr(req, SLOTS, req.kv.kv_allocated_len)
        setattr(req, HANDED_OVER, False)
        if repeat_of(req) is not None:
            continue
        prompt_len = len(req.full_untruncated_fill_ids)
        new = book.admit(req.kv.req_pool_idx, prompt_len, keep_of(req), has_spilled(req))
        book.readmitted += new and req.retraction_count > 0


def replace_alloc_for_decode(batch: Any, token_per_req: int) -> torch.Tensor:
    """A decode step takes head pages, no slot of the pool.

    Returns:
        ``int64 [bs]`` zeros: SGLang's padding slot, which nobody reads.
    """
    from fairkv_sglang.patches.prefix_cache import HANDED_OVER, owns_nothing

    rows = batch.req_pool_indices_cpu.tolist()
    this_rank().book.grow(rows)
    for req in batch.reqs:
        req.kv.kv_allocated_len += token_per_req
        req.kv.kv_committed_len += token_per_req
        if getattr(req, HANDED_OVER, False):
            owns_nothing(req, batch.tree_cache.page_size)
    return torch.zeros(len(rows) * token_per_req, dtype=torch.int64, device=batch.device)


def around_create_prefill_budget(
    original: Any, allocator: Any, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
) -> Any:
    """Admission checks pool slots and the head pages of all ranks."""
    from fairkv_sglang.patches.prefill_budget import FairKVPrefillBudget

    book = this_rank().book
    return FairKVPrefillBudget(allocator, tree_cache, book, num_mixed_decode_tokens)


def around_add_request(original: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Admit by the budget alone, which is told what the request wants kept, for certain who was
    retracted because its prompt spilled (on a prefill server everybody, as nothing can be retracted
    there), and whose prompt is only repeated. A request whose prompt another one repeats is passed
    over.

    Without prefix caching SGLang asks, for a request that ignores the end of sequence, whether its
    output fits into the pool, too.
    """
    rank = this_rank()
    if rank.repeats is not None and rank.repeats.waits(req):
        from sglang.srt.managers.schedule_policy import AddReqResult

        return AddReqResult.CONTINUE
    rank.book.admission.certain = rank.role == "prefill" or has_spilled(req)
    rank.book.admission.repeats = repeat_of(req) is not None
    parameters = req.sampling_params
    ignores, parameters.ignore_eos = parameters.ignore_eos, False
    try:
        with asking(keep_of(req)):
            return original(adder, req, *args, **kwargs)
    finally:
        parameters.ignore_eos = ignores


def around_running_output(original: Any, adder: Any, req: Any) -> Any:
    """What a running request is expected to write: no more than until it is compressed again."""
    tokens, outputs = original(adder, req), this_rank().book.outputs
    left = outputs.left(req.kv.req_pool_idx) if outputs is not None and req.kv.holds_kv else None
    return tokens if left is None else min(tokens, left)


def around_new_prefill(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Look for new prompts with what SGLang cannot know of head pages.

    * SGLang stops looking when a prompt did not fit, until a running request ends. A prompt gives
      its slots back much earlier here, and SGLang looks again.
    * A chunk does not share its pass with running requests that would not get their pages in it.
      A decode step instead could only retract them, down to the last one, which SGLang then aborts:
      the pages that are missing are reserved for the prompt of the chunk.
    * SGLang up to 0.5.21 forgets a request that it preempted for one that did not fit after all.
    * Requests whose prompts spilled are retracted, and wait behind this pass (``spills.py``).
    * So do those whose prompts were repeated (``repeating.py``).
    """
    rank, running = this_rank(), _running(scheduler, args, kwargs)
    book, repeats = rank.book, rank.repeats
    ledger, spilled = book.ledger, retract_spilled(book, running)
    repeated = repeats.take_out(running) if repeats is not None else []
    if repeats is not None:
        repeats.begin_pass(scheduler.chunked_req)
    if book.take_made_room() or repeated:
        running.batch_is_full = False
    before, mixed = list(running.reqs), scheduler.is_mixed_chunk
    if scheduler.chunked_req is not None:
        scheduler.is_mixed_chunk = mixed and ledger.can_grow(ledger.rows)
    try:
        plan = original(scheduler, *args, **kwargs)
    finally:
        scheduler.is_mixed_chunk = mixed
    if forgets_preempted() and plan.batch_to_run is None:
        for req in before:
            if not (req.finished() or req.kv.holds_kv):
                scheduler._add_request_to_queue(req)
    for req in spilled:
        scheduler._add_request_to_queue(req)
        plan.running_batch.batch_is_full = False
    if repeats is not None:
        repeats.launched(plan, scheduler.chunked_req)
        repeats.put_back(scheduler, repeated)
    return plan


def around_defer_prefill(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    """No decode steps between chunks (``--prefill-decode-interval``) that lack pages.

    Nor with a request whose prompt spilled or was repeated; the search for new prompts retracts it.
    """
    rank = this_rank()
    book, ledger, repeats = rank.book, rank.book.ledger, rank.repeats
    lacking = scheduler.chunked_req is not None and not ledger.can_grow(ledger.rows)
    if lacking or book.charges.spilled or (repeats is not None and repeats.pending):
        return False
    return bool(original(scheduler, *args, **kwargs))


def _running(scheduler: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return args[0] if args else named.get("running_batch", scheduler.running_batch)


def around_check_decode_capacity(
    original: Any, allocator: Any, *, requests: Any = None, **kwargs: Any
) -> bool:
    """The next step fits if every rank has the head pages; else SGLang retracts."""
    if requests is None:
        raise RuntimeError("FairKV: SGLang asked for decode capacity without naming the requests")
    return bool(this_rank().book.ledger.can_grow([req.kv.req_pool_idx for req in requests]))


def around_max_new_tokens(
    original: Any, allocator: Any, input_tokens: int, max_new_tokens: int, **kwargs: Any
) -> int | None:
    """Longest output of a request that has the server to itself; None if its prompt cannot fit."""
    rank, keep = this_rank(), asked()
    book, division = rank.book, rank.division
    scope = keep.scope(rank.scope, input_tokens)
    if input_tokens + allocator.page_size + 1 > division.pool_tokens:
        return None
    # One page per lane more: a retracted request comes back with a longer prompt, rounded anew.
    # A new plan may come before it ends, and a retracted request is routed by the new one.
    lanes = book.demand.most_lanes
    left = book.ledger.capacity - book.demand.under_any_plan(input_tokens, scope) - lanes
    if np.any(left < 0):
        return None
    by_pages = book.demand.output(left, input_tokens)
    by_table = division.max_head_tokens - scope.longest(input_tokens)
    if by_table < 1:
        return None
    if _holds_for_ever(rank, keep, input_tokens, by_pages, by_table):
        by_pages = by_table = max_new_tokens
    # A retracted request prefills its output again, in whole pages of the pool and one to spare.
    by_pool = division.pool_tokens - allocator.page_size - input_tokens
    longest = max(0, min(max_new_tokens, by_pages, by_table, by_pool))
    return _longest_return(rank, keep, input_tokens, longest)


def _holds_for_ever(
    rank: Rank, keep: Keep, input_tokens: int, by_pages: int, by_table: int
) -> bool:
    """Whether a request alone has room for all that it may hold, however much it writes."""
    book = rank.book
    bound = book.outputs.rule.bound(input_tokens, keep) if book.outputs is not None else None
    if bound is None:
        return False
    if bound.whole is None:
        return min(by_pages, by_table) >= bound.due
    most = bound.most(np.full_like(bound.whole, input_tokens))
    return bool(
        most.max() <= rank.division.max_head_tokens
        and np.all(book.demand.of_tokens(most) <= book.ledger.capacity)
    )


def _longest_return(rank: Rank, keep: Keep, input_tokens: int, longest: int) -> int:
    """Most output, up to ``longest``, with which a prompt can still be admitted anew.

    The bound of a compressed prompt may rise faster than the prompt, but not without end, so nearly
    always this is ``longest`` and costs one look.
    """
    book, most = rank.book, rank.division.max_head_tokens
    bound = book.outputs.rule.bound(input_tokens, keep) if book.outputs is not None else None
    slack = bound.slack if bound is not None else 0  # it goes on from there
    more = book.demand.most_lanes * -(-slack // PAGE_TOKENS)

    def fits(output: int) -> bool:
        length = input_tokens + output
        scope = keep.scope(rank.scope, length)
        return bool(
            np.all(book.demand.under_any_plan(length, scope) + more <= book.ledger.capacity)
            and scope.longest(length) + slack <= most
        )

    if fits(longest):
        return longest
    low, high = 0, longest  # fits, does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def after_verify_byte_accounting(result: list[str], allocator: Any) -> list[str]:
    """SGLang's idle check reports leaked head pages like leaked slots."""
    rank = this_rank()
    if rank.exporter is not None:
        rank.exporter.update()
    return [*result, *rank.book.check_idle()]


def around_validate_beam(original: Any, coordinator: Any, req: Any, recv_req: Any) -> str:
    """Beams share the slots of their prompt in the pool, which FairKV gives back."""
    return "Beam search is not supported with FairKV."


_ALLOCATOR = "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator"

_BEAM = "sglang.srt.beam_search.coordinator"
# Asked for by a request (``beam_width``), so that no check of server arguments can see it.
_BEAM_HOOKS = (
    (
        Hook(
            target=f"{_BEAM}.BeamCoordinator.validate_and_init",
            kind="around",
            function=around_validate_beam,
            why="a beam request would take slots and rows that FairKV does not know of",
            since="0.5.21",
            upstream="sglang/srt/beam_search/coordinator.py",
        ),
    )
    if find_spec("sglang.srt.beam_search") is not None
    else ()
)

HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.mem_cache.allocation.alloc_for_extend",
        kind="after",
        function=after_alloc_for_extend,
        why="owners are fixed and head pages charged when a prompt is admitted",
        since="0.5.20",
        upstream="sglang/srt/mem_cache/allocation.py",
    ),
    Hook(
        target="sglang.srt.mem_cache.allocation.alloc_for_decode",
        kind="replace",
        function=replace_alloc_for_decode,
        why="decode appends to head pages and takes no slot of the pool",
        since="0.5.20",
        upstream="sglang/srt/mem_cache/allocation.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill",
        kind="around",
        function=around_new_prefill,
        why="prompts give their slots back long before a request ends; chunks keep head pages that "
        "running requests need; preempted requests must not be forgotten, those whose prompts took "
        "more pages than were charged retracted",
        since="0.5.17",
        upstream="sglang/srt/managers/scheduler.py (batch_is_full, preempt_list)",
        test="tests/patches/test_scheduling.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._should_defer_prefill",
        kind="around",
        function=around_defer_prefill,
        why="the last running request would be aborted for pages that a chunk keeps; one whose "
        "prompt is not all there must not decode",
        since="0.5.21",
        upstream="sglang/srt/managers/scheduler.py (prefill_decode_interval)",
        test="tests/patches/test_scheduling.py",
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        kind="around",
        function=around_add_request,
        why="outputs of requests that ignore the end of sequence take no slots of the pool; each "
        "request is admitted by what it wants kept, one that took more head pages than charged "
        "by the most it could",
        since="0.5.17",
        upstream="sglang/srt/managers/schedule_policy.py (add_one_req_ignore_eos)",
        test="tests/patches/test_scheduling.py",
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.PrefillAdder."
        "_get_running_request_total_token_offset",
        kind="around",
        function=around_running_output,
        why="the room of outputs to come ends where a request is compressed again",
        since="0.5.21",
        upstream="sglang/srt/managers/schedule_policy.py",
        test="tests/patches/test_output_admission.py",
    ),
    Hook(
        target=f"{_ALLOCATOR}.create_prefill_budget",
        kind="around",
        function=around_create_prefill_budget,
        why="admission needs pool slots and the head pages of the fullest rank",
        since="0.5.20",
        upstream="sglang/srt/mem_cache/prefill_budget.py",
    ),
    Hook(
        target=f"{_ALLOCATOR}.check_decode_capacity",
        kind="around",
        function=around_check_decode_capacity,
        why="retraction follows head pages, the same on all ranks",
        since="0.5.20",
        upstream="sglang/srt/mem_cache/allocator/base.py",
    ),
    Hook(
        target=f"{_ALLOCATOR}.max_new_tokens_for_memory",
        kind="around",
        function=around_max_new_tokens,
        why="a request is clipped by head pages, its prompt by the prefill pool",
        since="0.5.20",
        upstream="sglang/srt/mem_cache/allocator/base.py",
    ),
    Hook(
        target=f"{_ALLOCATOR}.verify_byte_accounting",
        kind="after",
        function=after_verify_byte_accounting,
        why="leaked head pages fail SGLang's strict idle check",
        since="0.5.20",
        upstream="sglang/srt/mem_cache/allocator/base.py",
    ),
    *_BEAM_HOOKS,
)

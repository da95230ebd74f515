# SPDX-License-Identifier: Apache-2.0
"""Hooks on allocation and admission: decode takes no slot, head pages decide who runs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from fairkv_sglang.attention.forward_spans import forward_spans
from fairkv_sglang.memory.page_ledger import PAGE_TOKENS
from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.patches.rank import Rank, this_rank

ERRORS = "fairkv_errors"
"""Attribute of a pass's result: the ticket of its device errors."""


def after_alloc_for_extend(result: Any, batch: Any) -> None:
    """A prompt (or its next chunk) got its slots: fix owners, charge its head pages."""
    from fairkv_sglang.patches.prefix_cache import HANDED_OVER, SLOTS

    book = this_rank().book
    for req in batch.reqs:
        setattr(req, SLOTS, req.kv.kv_allocated_len)
        setattr(req, HANDED_OVER, False)
        new = book.admit(req.kv.req_pool_idx, len(req.full_untruncated_fill_ids))
        book.readmitted += new and req.retracted_stain


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
    """Admit by the budget alone.

    Without prefix caching SGLang asks, for a request that ignores the end of sequence, whether its
    output fits into the pool, too.
    """
    parameters = req.sampling_params
    ignores, parameters.ignore_eos = parameters.ignore_eos, False
    try:
        return original(adder, req, *args, **kwargs)
    finally:
        parameters.ignore_eos = ignores


def before_new_prefill(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Ask for new prompts again after a prompt gave its slots back.

    SGLang stops asking when a prompt did not fit, until a running request ends. Its slots are free
    much earlier here.
    """
    if this_rank().book.take_made_room():
        batch = args[0] if args else kwargs.get("running_batch", scheduler.running_batch)
        batch.batch_is_full = False


def around_check_decode_capacity(
    original: Any, allocator: Any, *, requests: Any = None, **kwargs: Any
) -> bool:
    """The next step fits if every rank has the head pages; else SGLang retracts."""
    if requests is None:
        raise RuntimeError("FairKV: SGLang asked for decode capacity without naming the requests")
    ledger = this_rank().book.ledger
    need = ledger.growth([req.kv.req_pool_idx for req in requests])
    return bool(np.all(need <= ledger.free))


def around_max_new_tokens(
    original: Any, allocator: Any, input_tokens: int, max_new_tokens: int, **kwargs: Any
) -> int | None:
    """Longest output of a request that has the server to itself; None if its prompt cannot fit."""
    rank = this_rank()
    book, division = rank.book, rank.division
    if input_tokens + allocator.page_size + 1 > division.pool_tokens:
        return None
    # One page per lane more: a retracted request comes back with a longer prompt, rounded anew.
    # A new plan may come before it ends, and a retracted request is routed by the new one.
    lanes = book.demand.most_lanes
    left = book.ledger.capacity - book.demand.under_any_plan(input_tokens) - lanes
    if np.any(left < 0):
        return None
    by_pages = int((left // np.maximum(lanes, 1)).min()) * PAGE_TOKENS
    longest_head = int(rank.scope.per_head_bound(input_tokens).max())
    by_table = division.max_head_tokens - longest_head
    if by_table < 1:
        return None
    # A retracted request prefills its output again, in whole pages of the pool and one to spare.
    by_pool = division.pool_tokens - allocator.page_size - input_tokens
    longest = max(0, min(max_new_tokens, by_pages, by_table, by_pool))
    return _longest_return(rank, input_tokens, longest)


def _longest_return(rank: Rank, input_tokens: int, longest: int) -> int:
    """Most output, up to ``longest``, with which a prompt can still be admitted anew.

    The bound of a compressed prompt may rise faster than the prompt, but not without end, so nearly
    always this is ``longest`` and costs one look.
    """
    book, most = rank.book, rank.division.max_head_tokens

    def fits(output: int) -> bool:
        length = input_tokens + output
        return bool(
            np.all(book.demand.under_any_plan(length) <= book.ledger.capacity)
            and rank.scope.per_head_bound(length).max() <= most
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


def before_forward_batch(
    worker: Any, batch: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """On the forward stream: return freed pages, then tell the backend which prompts end here."""
    if batch is not None:
        rank = this_rank()
        spans = forward_spans(batch)
        rank.book.begin_forward([span.row for span in spans.last])
        rank.backend.spans = spans
        if rank.replanner is not None:
            rank.replanner.step()
        if rank.exporter is not None:
            rank.exporter.update()
    return None


def after_forward_batch(result: Any, *args: Any, **kwargs: Any) -> Any:
    """On the forward stream: the pass is launched, its device errors follow it."""
    setattr(result, ERRORS, this_rank().book.errors.send())
    return result


def before_process_result(scheduler: Any, batch: Any, result: Any) -> None:
    """Device errors are looked at before any of the pass's tokens is given out.

    Raises:
        RuntimeError: if a kernel reported one; SGLang then stops the server.
    """
    ticket = getattr(result, ERRORS, None)
    if ticket is not None:
        this_rank().book.errors.check(ticket)


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
        kind="before",
        function=before_new_prefill,
        why="prompts give their slots back long before a request ends, and SGLang would not look",
        since="0.5.17",
        upstream="sglang/srt/managers/scheduler.py (batch_is_full)",
        test="tests/engine/test_memory.py",
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        kind="around",
        function=around_add_request,
        why="outputs of requests that ignore the end of sequence take no slots of the pool",
        since="0.5.17",
        upstream="sglang/srt/managers/schedule_policy.py (add_one_req_ignore_eos)",
        test="tests/patches/test_scheduling.py",
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
    Hook(
        target="sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        kind="before",
        function=before_forward_batch,
        why="only the schedule batch knows which prompts end in a pass",
        since="0.5.17",
        upstream="sglang/srt/managers/tp_worker.py",
    ),
    Hook(
        target="sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        kind="after",
        function=after_forward_batch,
        why="errors of device kernels come back with the result of their pass",
        since="0.5.17",
        upstream="sglang/srt/managers/tp_worker.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        kind="before",
        function=before_process_result,
        why="a rank with a device error must stop before it gives out a token",
        since="0.5.17",
        upstream="sglang/srt/managers/scheduler.py",
        test="tests/patches/test_scheduling.py",
    ),
    *_BEAM_HOOKS,
)

# SPDX-License-Identifier: Apache-2.0
"""Hooks for prefill-decode disaggregation: kept rows are sent, and admitted by what has come."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fairkv_sglang.memory.rows import RowBook
from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.patches.rank import this_rank
from fairkv_sglang.patches.request_options import keep_of
from fairkv_sglang.patches.transfer import GET_CLASS
from fairkv_sglang.patches.transfer_requests import KeptRowsReceiver, KeptRowsSender


def around_send_kv_chunk(
    original: Any, scheduler: Any, req: Any, last_chunk: bool = False, **kwargs: Any
) -> None:
    """After a prompt's last chunk its rows are in head pages: the decode server is told how many.

    Nothing can go before. Requests of SGLang's own (warm-up, health) have another sender.
    """
    sender = req.disagg_kv_sender
    if not isinstance(sender, KeptRowsSender):
        original(scheduler, req, last_chunk=last_chunk, **kwargs)
    elif last_chunk:
        scheduler.disagg_metadata_buffers.set_buf(req)
        sender.announce(req.kv.req_pool_idx)


def replace_send_cached_prefix(scheduler: Any, req: Any, **kwargs: Any) -> None:
    """Nothing goes before the last chunk, what is cached already neither."""


def around_build_decode_rows(
    original: Any,
    configurator: Any,
    *,
    max_num_reqs: int,
    extra_max_context_len: int,
    pre_alloc_size: int,
) -> Any:
    """SGLang's request table of any other server, which head pages go with (``RowBook``).

    That of a decode server has rows for requests in transfer beside those that run. Here both are
    of the rows that page tables have.
    """
    return configurator._build_default_req_pool(
        max_num_reqs=max_num_reqs, extra_max_context_len=extra_max_context_len
    )


def around_pop_preallocated(
    original: Any, queue: Any, *args: Any, **kwargs: Any
) -> tuple[list[Any], list[Any]]:
    """Admit those whose counts have come, in their order, while there are pages for them.

    Returns:
        Requests that wait for their rows from now on, and those that have failed.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    scheduler = queue.scheduler
    queue._resolve_pending_reqs()
    queue._update_handshake_waiters()
    if scheduler.enable_priority_scheduling:
        sign = 1 if scheduler.schedule_low_priority_values_first else -1
        queue.queue.sort(key=lambda entry: entry.req.priority * sign)
    waiting: list[Any] = []
    admitted: list[Any] = []
    failed: list[Any] = []
    full = False
    for entry in queue.queue:
        req = entry.req
        if isinstance(req.finished_reason, FINISH_ABORT):
            if not getattr(req, "finished_output", False):
                scheduler.output_streamer.stream_output([req], req.return_logprob)
            entry.kv_receiver.clear()
            entry.kv_receiver = None
            failed.append(entry)
        elif full or not entry.waiting_for_input:
            waiting.append(entry)
        elif _admit(queue, entry, admitted):
            admitted.append(entry)
        else:
            full = True
            waiting.append(entry)
    queue.queue = waiting
    gone = {id(entry) for entry in failed}
    queue.pending_reqs = [entry for entry in queue.pending_reqs if id(entry) not in gone]
    return admitted, failed


def _admit(queue: Any, entry: Any, admitted: list[Any]) -> bool:
    """Give a request its row and its pages, if there are any; then its rows may come."""
    from fairkv_sglang.patches.prefix_cache import HANDED_OVER, SLOTS, owns_nothing

    req, receiver, book = entry.req, entry.kv_receiver, this_rank().book
    table, indices = queue.req_to_token_pool, queue.req_to_metadata_buffer_idx_allocator
    if not (table.available_size() and indices.available_size()):
        return False
    length, keep = len(req.origin_input_ids), keep_of(req)
    ours = isinstance(receiver, KeptRowsReceiver)
    if ours:
        kept = receiver.kept
    else:  # a request of SGLang's own, of which nothing comes
        kept = np.asarray(keep.scope(book.scope, length).expected(length)).astype(np.int64)
    asked = book.admission.ask_kept(length, kept, keep)
    lasting = asked.lasting(_reserved(queue, req))
    if len(book.ledger) and np.any(lasting > _left(queue, book, admitted)):
        return False

    [row] = table.alloc([req])
    book.admission.promise(asked)
    book.admit(row, length, keep)
    book.note_kept(row, torch.from_numpy(kept))
    book.hand_over(row, 0)
    table.req_to_token[row] = 0
    req.full_untruncated_fill_ids = req.origin_input_ids + req.output_ids
    req.kv.kv_committed_len = req.kv.kv_allocated_len = length
    req.prefix_indices = torch.empty((0,), dtype=torch.int64)
    req.set_extend_range(0, length)
    setattr(req, SLOTS, 0)
    setattr(req, HANDED_OVER, True)
    req.skip_radix_cache_insert = True
    owns_nothing(req, queue.token_to_kv_pool_allocator.page_size)
    entry.metadata_buffer_index = index = indices.alloc()
    if ours:
        receiver.pull(row, index)
    else:
        book.receive(row, lambda: None)
        receiver.send_metadata([], index)
    queue._num_published_destinations += 1
    req.time_stats.set_decode_transfer_queue_entry_time()
    return True


def _reserved(queue: Any, req: Any) -> int:
    """Tokens of output that a request has room for when another one is admitted."""
    left = req.sampling_params.max_new_tokens - len(req.output_ids)
    return max(0, min(left, queue.num_reserved_decode_tokens))


def _left(queue: Any, book: RowBook, admitted: list[Any]) -> Any:
    """``[R]`` pages beside those that are held and what outputs have room for."""
    scheduler = queue.scheduler
    others = [*scheduler.running_batch.reqs, *scheduler.waiting_queue]
    others += [entry.req for entry in (*queue.transfer_queue.queue, *admitted)]
    return book.ledger.free - book.demand.growth(sum(_reserved(queue, req) for req in others))


HOOKS: tuple[Hook, ...] = (
    GET_CLASS,
    Hook(
        target="sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin."
        "_send_kv_chunk",
        kind="around",
        function=around_send_kv_chunk,
        why="what goes over is known after the last chunk, and is not in SGLang's pool",
        since="0.5.21",
        upstream="sglang/srt/disaggregation/prefill.py",
        test="tests/patches/test_disaggregation.py",
    ),
    Hook(
        target="sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin."
        "maybe_send_cached_prefix_chunk",
        kind="replace",
        function=replace_send_cached_prefix,
        why="a cached prefix is not sent either, and on a CPU SGLang would ask CUDA for an event",
        since="0.5.21",
        upstream="sglang/srt/disaggregation/prefill.py",
        test="tests/engine/test_disaggregation.py",
    ),
    Hook(
        target="sglang.srt.disaggregation.decode.DecodePreallocQueue.pop_preallocated",
        kind="around",
        function=around_pop_preallocated,
        why="a decode server admits by the head pages that come, not by slots for whole prompts",
        since="0.5.17",
        upstream="sglang/srt/disaggregation/decode.py",
        test="tests/patches/test_disaggregation.py",
    ),
    Hook(
        target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator."
        "_build_decode_req_pool",
        kind="around",
        function=around_build_decode_rows,
        why="the request table of a decode server carries no head pages",
        since="0.5.20",
        upstream="sglang/srt/disaggregation/decode.py (DecodeReqToTokenPool)",
        test="tests/engine/test_disaggregation.py",
    ),
)

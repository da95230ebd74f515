# SPDX-License-Identifier: Apache-2.0
"""Hooks on SGLang's control channel: what is on, in the info endpoint and the metrics."""

from __future__ import annotations

from typing import Any

import torch

from fairkv_sglang.budgets.repeats import wording_of
from fairkv_sglang.control.metrics import Exporter
from fairkv_sglang.control.replan import Replanner
from fairkv_sglang.control.server_info import RankReport, guarded
from fairkv_sglang.decode_backends import choose
from fairkv_sglang.patches import measure
from fairkv_sglang.patches.ledger import Hook, verify
from fairkv_sglang.patches.rank import Rank, this_rank
from fairkv_sglang.patches.repeating import Repeats
from fairkv_sglang.patches.request_options import keep_of

REPLAN = "fairkv_replan"
"""Key of ``POST /set_internal_state`` with which an administrator asks for a new plan now."""
ADOPT = "fairkv_adopt"
"""The same from rank 0 to all ranks when a plan is ready."""


def after_scheduler_init(_: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Last point before serving: every hook is in effect, and the rank complete."""
    verify()
    rank = this_rank()
    rank.replanner = _replanner(rank, scheduler)
    if rank.scorer.repeats:
        wording = wording_of(scheduler.tokenizer)
        rank.repeats = Repeats(rank.scorer, rank.scope, keep_of, wording, rank.book.contexts)
    rank.report = RankReport(
        config=rank.config,
        scorer=rank.scorer,
        in_force=rank.in_force,
        division=rank.division,
        book=rank.book,
        twins=rank.twins,
        hand_over=rank.backend.compressor.hand_over,
        replanner=rank.replanner,
        prefill_backend=type(rank.backend.prefill).__name__,
        decode_backend=choose(
            rank.config.decode_backend, str(rank.book.pages.device), rank.model.sinks
        ),
        moved=rank.moved,
    )
    collector = getattr(scheduler.metrics_reporter, "metrics_collector", None)
    labels = getattr(collector, "labels", None)
    if labels:  # the server has metrics on (``--enable-metrics``)
        rank.exporter = Exporter(rank.report, {key: str(value) for key, value in labels.items()})
        rank.exporter.update()


def _replanner(rank: Rank, scheduler: Any) -> Replanner | None:
    """Watches the traffic from now on, if the configuration says so."""
    if rank.start.slots is None:
        return None

    def share(value: Any) -> Any:
        values = [value]
        torch.distributed.broadcast_object_list(
            values, scheduler.tp_group.ranks[0], scheduler.tp_cpu_group
        )
        return values[0]

    return Replanner(
        start=rank.start,
        book=rank.book,
        twins=rank.twins,
        share=share,
        in_force=rank.in_force,
    )


def after_get_internal_state(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Adds ``fairkv`` to the internal state that ``/server_info`` shows."""
    from sglang.srt.runtime_context import get_parallel

    rank = this_rank()
    mine = guarded(lambda: _rank_state(rank, scheduler))
    ranks: list[Any] = [mine]
    if rank.tp_size > 1:  # every rank takes part, whatever it has to say
        ranks = [None] * rank.tp_size
        torch.distributed.all_gather_object(ranks, mine, group=scheduler.tp_cpu_group)
    errors = [state for state in ranks if "error" in state]

    def server() -> dict[str, Any]:  # replicas of --dp-size answer in any order
        return rank.report.server(ranks) | {"replica": get_parallel().dp_rank or 0}

    result.internal_state["fairkv"] = errors[0] if errors else guarded(server)
    return result


def _rank_state(rank: Rank, scheduler: Any) -> dict[str, Any]:
    state = rank.report.rank()
    state["pool_tokens_held"] = _pool_tokens_held(scheduler)
    state["hooks"] = len(verify())
    if rank.repeats is not None:
        contexts = rank.book.contexts
        state["repeated"] = {
            "passes": contexts.passes, "tokens": contexts.tokens, "reused": contexts.reused,
        }  # fmt: skip
    if measure.is_asked_for():
        state |= measure.seconds
    return state


def _pool_tokens_held(scheduler: Any) -> int:
    """Slots of the prefill pool that requests hold; those of cached prefixes can be evicted."""
    cache = scheduler.tree_cache
    free = scheduler.token_to_kv_pool_allocator.available_size() + cache.evictable_size()
    return int(scheduler.max_total_num_tokens - free)


def after_pull_requests(result: list[Any] | None, receiver: Any) -> list[Any] | None:
    """A new plan enters SGLang's channel as a control request, which reaches all ranks at once."""
    from sglang.srt.managers.io_struct import SetInternalStateReq

    replanner = this_rank().replanner
    if result is None:
        return result
    for request in result:
        if isinstance(request, SetInternalStateReq):  # nobody but rank 0 may say so
            request.server_args.pop(ADOPT, None)
    if replanner is not None and replanner.take_answer():
        result.append(SetInternalStateReq(server_args={ADOPT: 1}))
    return result


def around_set_internal_state(original: Any, scheduler: Any, recv_req: Any) -> Any:
    """FairKV's own requests: a plan is ready, or the administrator asks for one."""
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    replanner = this_rank().replanner
    if ADOPT in recv_req.server_args:
        if replanner is not None:
            replanner.adopt()
        return None  # nobody waits for an answer
    if list(recv_req.server_args) == [REPLAN]:
        able = replanner is not None and replanner.mode == "on"
        if replanner is not None and able:
            replanner.force()
        return SetInternalStateReqOutput(updated=able)
    return original(scheduler, recv_req)


_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver"

HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.__init__",
        kind="after",
        function=after_scheduler_init,
        why="a rank must not serve with a hook missing",
        since="0.5.17",
        upstream="sglang/srt/managers/scheduler.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        kind="after",
        function=after_get_internal_state,
        why="the server says what is on",
        since="0.5.17",
        upstream="sglang/srt/managers/scheduler.py",
    ),
    Hook(
        target=f"{_RECEIVER}.SchedulerRequestReceiver._pull_raw_reqs",
        kind="after",
        function=after_pull_requests,
        why="all ranks must adopt a new plan between the same two steps",
        since="0.5.21",
        upstream="sglang/srt/managers/scheduler_components/request_receiver.py",
        test="tests/engine/test_replan.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.set_internal_state",
        kind="around",
        function=around_set_internal_state,
        why="re-planning now is an admin command under SGLang's access rules",
        since="0.5.17",
        upstream="sglang/srt/managers/scheduler.py",
        test="tests/engine/test_replan.py",
    ),
)

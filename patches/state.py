# SPDX-License-Identifier: Apache-2.0
"""Hooks on SGLang's control channel: what is on, in the info endpoint and the metrics."""

from __future__ import annotations

from typing import Any

import torch

from fairkv_sglang.patches.ledger import Hook

REPLAN = "fairkv_replan"
"""Key of ``POST /set_internal_state`` with which an administrator asks for a new plan now."""
ADOPT = "fairkv_adopt"
"""The same from rank 0 to all ranks when a plan is ready."""


def after_scheduler_init(_: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Last point before serving: every hook is in effect."""
    from fairkv_sglang.control.state import start_reporting
    from fairkv_sglang.runtime import get_runtime

    runtime = get_runtime()
    runtime.verify_hooks()

    def share(value: Any) -> Any:
        values = [value]
        torch.distributed.broadcast_object_list(
            values, scheduler.tp_group.ranks[0], scheduler.tp_cpu_group
        )
        return values[0]

    runtime.start_replanning(share)
    start_reporting(scheduler)


def after_get_internal_state(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Adds ``fairkv`` to the internal state that ``/server_info`` shows."""
    from fairkv_sglang.control.state import collect_state

    result.internal_state["fairkv"] = collect_state(scheduler)
    return result


def after_pull_requests(result: list[Any] | None, receiver: Any) -> list[Any] | None:
    """A new plan enters SGLang's channel as a control request, which reaches all ranks at once."""
    from sglang.srt.managers.io_struct import SetInternalStateReq

    from fairkv_sglang.runtime import get_runtime

    replanner = get_runtime().replanner
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

    from fairkv_sglang.runtime import get_runtime

    replanner = get_runtime().replanner
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

# SPDX-License-Identifier: Apache-2.0
"""Hooks around a pass: what precedes it on its stream, and the errors that follow it."""

from __future__ import annotations

from typing import Any

from fairkv_sglang.attention.forward_spans import forward_spans
from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.patches.rank import this_rank

ERRORS = "fairkv_errors"
"""Attribute of a pass's result: the ticket of its device errors."""


def before_forward_batch(
    worker: Any, batch: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """On the forward stream: return freed pages, compress outputs that are due, then tell the
    backend which prompts end here.
    """
    if batch is not None:
        rank = this_rank()
        spans = forward_spans(batch)
        rank.book.begin_forward([span.row for span in spans.last])
        if rank.outputs is not None:
            rank.outputs.step()
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


HOOKS: tuple[Hook, ...] = (
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
)

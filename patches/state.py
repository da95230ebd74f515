# SPDX-License-Identifier: Apache-2.0
"""Hooks on SGLang's control channel: what is on, in the info endpoint and the metrics."""

from __future__ import annotations

from typing import Any

from fairkv_sglang.patches.ledger import Hook


def after_scheduler_init(_: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Last point before serving: every hook is in effect."""
    from fairkv_sglang.control.state import start_reporting
    from fairkv_sglang.runtime import get_runtime

    get_runtime().verify_hooks()
    start_reporting(scheduler)


def after_get_internal_state(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Adds ``fairkv`` to the internal state that ``/server_info`` shows."""
    from fairkv_sglang.control.state import collect_state

    result.internal_state["fairkv"] = collect_state(scheduler)
    return result


def after_log_stats(_: Any, *args: Any, **kwargs: Any) -> None:
    """Refresh the gauges when SGLang refreshes its own."""
    from fairkv_sglang.control.state import update_metrics

    update_metrics()


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
        target=("sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats"),
        kind="after",
        function=after_log_stats,
        why="head-page use and balance are exported with SGLang's metrics",
        since="0.5.17",
        upstream="sglang/srt/observability/metrics_collector.py",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""Hooks on the load that a server reports: head pages of the fullest rank, not the prefill pool."""

from __future__ import annotations

from typing import Any

from fairkv_sglang.control.load import load_of
from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.patches.rank import this_rank


def after_get_loads(snapshot: Any, *args: Any, **kwargs: Any) -> Any:
    """For ``/v1/loads``, SGLang's load publisher, and its controller of replicas."""
    load = load_of(this_rank().book, snapshot.token_usage)
    waiting = snapshot.num_total_tokens - snapshot.num_used_tokens
    snapshot.num_used_tokens = load.used
    snapshot.num_total_tokens = load.used + round(load.kept * waiting)  # what those will keep
    snapshot.num_active_tokens = snapshot.num_total_tokens  # no request awaits another server
    snapshot.max_total_num_tokens = load.total
    snapshot.token_usage = round(load.usage, 4)
    if snapshot.memory is not None:
        snapshot.memory.token_capacity = load.total
    return snapshot


def after_update_stats(result: None, pool: Any, stats: Any) -> None:
    """For the metric ``sglang:token_usage``; SGLang's other metrics of the pool stay the pool's."""
    stats.token_usage = round(load_of(this_rank().book, pool.get_max_pool_usage()).usage, 2)


_COMPONENTS = "sglang.srt.managers.scheduler_components"

HOOKS: tuple[Hook, ...] = (
    Hook(
        target=f"{_COMPONENTS}.load_inquirer.SchedulerLoadInquirer.get_loads",
        kind="after",
        function=after_get_loads,
        why="routers and SGLang's controller of replicas would take a server full of running "
        "requests for an empty one",
        since="0.5.21",
        upstream="sglang/srt/managers/scheduler_components/load_inquirer.py",
        test="tests/engine/test_machines.py",
    ),
    Hook(
        target=f"{_COMPONENTS}.pool_stats_observer.PoolStats.update_scheduler_stats",
        kind="after",
        function=after_update_stats,
        why="and so would those that read the metric sglang:token_usage",
        since="0.5.21",
        upstream="sglang/srt/managers/scheduler_components/pool_stats_observer.py",
        test="tests/patches/test_loads.py",
    ),
)

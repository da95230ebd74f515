# SPDX-License-Identifier: Apache-2.0
"""What a server says of itself: the ``fairkv`` part of the info endpoint, and metrics.

The info request reaches every rank's scheduler over SGLang's ZMQ channel in the same order, so a
collective inside the handler is safe; only the first rank's answer goes back to the caller.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch.distributed as dist

import fairkv_sglang
from fairkv_sglang.control.metrics import Exporter
from fairkv_sglang.planning import budget_text
from fairkv_sglang.runtime import FairKVRuntime, get_runtime


def collect_state(scheduler: Any) -> dict[str, Any]:
    """State of all ranks, in plain JSON types.

    The names down to ``rank_loads`` are stable; ``head_pages_*`` are those of ``rank``, the rank
    that answers. ``kept_tokens`` of all heads came out of ``prompt_tokens`` in ``compactions``
    prompts, so ``kept_tokens / (prompt_tokens * layers * heads)`` is the part that was kept.

    Args:
        scheduler: SGLang's scheduler of this rank.
    """
    runtime = get_runtime()
    mine = rank_state(runtime)
    mine["pool_tokens_held"] = pool_tokens_held(scheduler)
    ranks: list[Any] = [mine]
    if runtime.tp_size > 1:
        ranks = [None] * runtime.tp_size
        dist.all_gather_object(ranks, mine, group=scheduler.tp_cpu_group)
    config = runtime.config
    residents, replanner = runtime.book.residents, runtime.replanner
    return {
        "enabled": True,
        "scorer": config.scorer,
        "scope": config.scope,
        "placement": runtime.plan.policy,
        "rank": mine["rank"],
        "head_pages_total": mine["pages"],
        "head_pages_used": mine["pages_used"],
        "kept_tokens": int(runtime.book.kept_sum.sum()),
        "prompt_tokens": runtime.book.kept_prompt_tokens,
        "compactions": runtime.book.kept_prompts,
        "balancedness": residents.balancedness(),
        "balancedness_planned": runtime.planned_balancedness,
        "rank_loads": residents.reads.sum(axis=0).tolist(),
        "replan": config.replan if replanner else "off",
        "replans": replanner.adopted if replanner else 0,
        "replan_pending": bool(replanner and replanner.pending),
        "plan_source": runtime.plan_source,
        "profile": str(config.profile) if config.profile else None,
        "window": runtime.scorer.window,
        "options": {**config.options("scorer"), **config.options("scope")},
        "decode_backend": runtime.decode_backend,
        "traffic": {
            **runtime.book.recorder.summary(),
            "tokens": runtime.book.recorder.tokens.tolist(),
        },
        "version": fairkv_sglang.__version__,
        "budget": budget_text(config),
        "copies": int(runtime.plan.copy_counts().sum()),
        "planned": _plain(runtime.plan.info),
        "plan": json.loads(runtime.plan.to_json()),
        "plan_digest": runtime.plan.digest,
        "kept": {
            "prompts": runtime.book.kept_prompts,
            "prompt_tokens": runtime.book.kept_prompt_tokens,
            "tokens": runtime.book.kept_sum.tolist(),
        },
        "ranks": ranks,
        "decisions_agree": len({rank["decisions"]["digest"] for rank in ranks}) == 1,
    }


def rank_state(runtime: FairKVRuntime) -> dict[str, Any]:
    """State of one rank, in plain JSON types; sizes in bytes, pages and tokens as named."""
    book, division = runtime.book, runtime.division
    rank = runtime.heads.rank
    pages = book.pages
    ledger, replanner = book.ledger, runtime.replanner
    return {
        "rank": rank,
        "lanes": sum(map(len, runtime.heads.heads)),
        "lane_slots": runtime.heads.num_lanes,
        "pool_tokens": division.pool_tokens if division else 0,
        "pool_bytes": division.pool_bytes if division else 0,
        "total_bytes": division.total_bytes if division else 0,
        "page_bytes": pages.page_bytes,
        "pages": pages.num_pages,
        "pages_used": pages.num_used,
        "tokens_stored": int(pages.lens.sum()),
        "pages_charged": int(ledger.held[rank]),
        "peak_pages_charged": int(book.peak_pages[rank]),
        "requests": book.live_requests,
        "peak_requests": book.peak_requests,
        "max_requests": division.max_requests if division else 0,
        "handed_over_tokens": book.handed_over_tokens,
        "prefill_backend": runtime.prefill_backend,
        "prefill_seconds": runtime.prefill_seconds,
        "compress_seconds": runtime.compress_seconds,
        "hand_over_bytes": runtime.hand_over_bytes,
        "hand_over_seconds": runtime.hand_over_seconds,
        "twin_bytes": runtime.twins.bytes if runtime.twins else 0,
        "replan_passes": replanner.passes if replanner else 0,
        "replan_seconds": replanner.seconds if replanner else 0.0,
        "replan_longest_seconds": replanner.longest if replanner else 0.0,
        "lane_weight_bytes": runtime.twins.bytes_brought if runtime.twins else 0,
        "hooks": len(runtime.verify_hooks()),
        "decisions": {"count": book.log.count, "digest": book.log.digest},
    }


def pool_tokens_held(scheduler: Any) -> int:
    """Slots of the prefill pool that requests hold; those of cached prefixes can be evicted."""
    cache = scheduler.tree_cache
    free = scheduler.token_to_kv_pool_allocator.available_size() + cache.evictable_size()
    return int(scheduler.max_total_num_tokens - free)


def _plain(value: Any) -> Any:
    """Only types that SGLang's message format carries."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


REFRESH_SECONDS = 1.0

_exporter: Exporter | None = None
_refreshed = 0.0


def start_reporting(scheduler: Any) -> None:
    """Create the metrics if the server has them on (``--enable-metrics``)."""
    global _exporter
    collector = getattr(scheduler.metrics_reporter, "metrics_collector", None)
    labels = getattr(collector, "labels", None)
    if labels:
        _exporter = Exporter({key: str(value) for key, value in labels.items()})
        update_metrics()


def update_metrics() -> None:
    """Bring the metrics up to the present state, once a second; nothing if they are off.

    Every rank does so before its passes and at idle: SGLang logs its own statistics on the first
    rank alone.
    """
    global _refreshed
    now = time.monotonic()
    if _exporter is not None and now >= _refreshed + REFRESH_SECONDS:
        _refreshed = now
        _exporter.update(get_runtime())

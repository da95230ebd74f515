# SPDX-License-Identifier: Apache-2.0
"""Hooks on memory pools: division of the KV memory, head-page arena."""

from __future__ import annotations

import logging
from typing import Any

import torch

from fairkv_sglang.config import from_environment
from fairkv_sglang.memory.make_book import make_book
from fairkv_sglang.memory.rows import RowBook
from fairkv_sglang.memory.sizing import divide_memory, most_of_a_pass
from fairkv_sglang.model import Model
from fairkv_sglang.patches.ledger import Hook, HookError, verify
from fairkv_sglang.patches.nodes import agreed_plan
from fairkv_sglang.patches.overrides import overrides
from fairkv_sglang.patches.rank import Rank, begin, this_rank
from fairkv_sglang.plan_file import received
from fairkv_sglang.planning import make_start

logger = logging.getLogger(__name__)


def before_load_model(runner: Any) -> None:
    """Build this rank's state, with the plan, before the first attention layer exists.

    Raises:
        HookError: if the parent's hook is missing.
        SystemExit: if another node was started otherwise.
    """
    from sglang.srt.runtime_context import get_disagg, get_parallel

    verify()
    config = from_environment()
    if config is None:
        raise RuntimeError("FairKV: no configuration in this process's environment")
    plan = received()
    if plan is None:
        raise HookError(
            "FairKV cannot run: the parent handed over no plan, so its hook "
            "sglang.srt.server_args.ServerArgs.resolve_once did not take effect"
        )
    model = Model.from_sglang(runner.model_config)
    # Attention classes fall back to hidden_size // heads, which a twin's counts would change.
    runner.model_config.hf_text_config.head_dim = model.head_dim
    device, parallel = str(runner.device), get_parallel()
    start = make_start(config, model, plan.tp_size, device, plan)
    if parallel.nnodes > 1:
        plan = agreed_plan(start, runner.tp_group, parallel.node_rank)
        start = make_start(config, model, plan.tp_size, device, plan)
    rank = Rank(start, parallel.tp_rank, get_disagg().disaggregation_mode)
    begin(rank)
    logger.info(rank.describe())


def after_resolve_pool_config(result: Any, configurator: Any, *args: Any, **kwargs: Any) -> Any:
    """Give SGLang's pool its part of the memory only."""
    from sglang.srt.runtime_context import get_parallel, get_schedule

    rank, schedule = this_rank(), get_schedule()
    model = configurator.model_config
    division = divide_memory(
        lane_slots=rank.heads.table.capacity,
        total_tokens=result.max_total_num_tokens,
        stock_heads=model.get_num_kv_heads(get_parallel().attn_tp_size),
        head_dim=rank.model.head_dim,
        dtype_bytes=torch.empty((), dtype=configurator.kv_cache_dtype).element_size(),
        page_size=schedule.page_size,
        context_len=model.context_len,
        pass_tokens=most_of_a_pass(schedule.chunked_prefill_size, schedule.max_prefill_tokens),
        max_requests=result.max_running_requests,
        prefill_pool=rank.config.prefill_pool,
        max_head_tokens=rank.config.max_head_tokens,
        arena_pages=rank.config.debug.arena_pages,
        recent_bytes=rank.config.recent_queries
        * rank.model.group_size
        * rank.model.head_dim
        * torch.empty((), dtype=configurator.kv_cache_dtype).element_size(),
        score_bytes=rank.start.score_bytes(rank.heads.homes.per_rank),
        sliding_window=rank.model.ring,
    )
    rank.division = division
    result.max_total_num_tokens = division.pool_tokens
    result.max_running_requests = division.max_requests
    logger.info("FairKV: %s", division.describe(rank.heads.rank, rank.heads.num_lanes))
    return result


def after_configure(result: Any, configurator: Any, *args: Any, **kwargs: Any) -> None:
    """Allocate head pages and let SGLang's request table carry them.

    Raises:
        RuntimeError: for a layout of SGLang's pool that kept rows cannot be read from.
    """
    layout = getattr(result.token_to_kv_pool, "kv_cache_layout", "nhd")
    if layout != "nhd":
        raise RuntimeError(
            f"FairKV needs SGLang's NHD KV layout, found {layout}: unset SGLANG_USE_HND_KVCACHE"
        )
    rank = this_rank()
    rank.book = make_book(
        rank.heads,
        rank.scope,
        rank.division,
        head_dim=rank.model.head_dim,
        dtype=configurator.kv_cache_dtype,
        device=str(configurator.device),
        window=rank.config.replan_window,
        verbose=rank.config.debug.log_decisions,
        forecast_factor=rank.config.debug.forecast_factor,
        slack=rank.config.decode_slack if rank.config.decode_compression else None,
        recent=rank.config.recent_queries or None,
    )
    result.req_to_token_pool.attach_aux_cache(rank.book)


_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"

HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        kind="before",
        function=before_load_model,
        why="the plan must exist before the first attention layer is built",
        since="0.5.17",
        upstream="sglang/srt/model_executor/model_runner.py",
    ),
    Hook(
        target=f"{_CONFIGURATOR}._resolve_memory_pool_config",
        kind="after",
        function=after_resolve_pool_config,
        why="the KV memory is divided between the prefill pool and head pages",
        since="0.5.20",
        upstream="sglang/srt/mem_cache/kv_cache_configurator.py",
    ),
    Hook(
        target=f"{_CONFIGURATOR}.configure",
        kind="after",
        function=after_configure,
        why="head pages live and die with the rows of SGLang's request table",
        since="0.5.20",
        upstream="sglang/srt/mem_cache/memory_pool.py (attach_aux_cache)",
    ),
)


OVERRIDES = overrides(
    RowBook,
    None,
    {
        "free": "head pages go back when SGLang frees a row",
        "clear": "and when it frees them all",
        "alloc_to_lengths": "pages are charged by the hooks on allocation, not here",
        "reset_allocator": "SGLang resets allocators at idle",
        "dense_capacity": "the scheduler counts with the prefill pool",
    },
    callers=("sglang.srt.mem_cache.memory_pool",),
    since="0.5.20",
    test="tests/engine/test_memory.py",
    receiver="_aux_cache",
)
"""Of the object that SGLang's request table carries."""

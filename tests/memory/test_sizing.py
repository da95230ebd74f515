# SPDX-License-Identifier: Apache-2.0
"""Division of the KV memory: parts fit, and what SGLang needs equal is equal on all ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.kernels import HeadPages
from fairkv_sglang.kernels.pages import RUN_PAGES
from fairkv_sglang.memory import PAGE_TOKENS, MemoryDivision, divide_memory
from fairkv_sglang.memory.sizing import LEAST_PAGES, default_pool, most_of_a_pass
from fairkv_sglang.model import PRESETS
from fairkv_sglang.placement import Plan
from fairkv_tests.core_cases import QUICK, random_plan, seeds, splits

RUN_BYTES = 4 * RUN_PAGES


def division(plan: Plan, **options: object):
    values: dict = {
        "total_tokens": 20_000,
        "stock_heads": 2,
        "head_dim": 64,
        "dtype_bytes": 2,
        "page_size": 1,
        "context_len": 4096,
        "pass_tokens": 512,
        "max_requests": 64,
    }
    return divide_memory(lane_slots=(plan.shares() > 0).sum(axis=2), **{**values, **options})


@settings(QUICK, max_examples=150)
@given(
    seed=seeds,
    split=splits,
    total_tokens=st.integers(100, 100_000),
    page_size=st.sampled_from([1, 16, 64]),
    context_len=st.integers(64, 40_000),
    pass_tokens=st.sampled_from([0, 64, 2048]),
    max_requests=st.integers(1, 300),
    prefill_pool=st.one_of(st.none(), st.integers(1, 50_000)),
    max_head_tokens=st.one_of(st.none(), st.integers(1, 50_000)),
    recent_bytes=st.sampled_from([0, 0, 512, 8192]),
)
def test_parts_fit(seed: int, split: tuple[int, int], **options) -> None:
    heads, ranks = split
    plan = random_plan(np.random.default_rng(seed), 2, ranks, heads)
    lanes = np.array([int(plan.lane_start(rank)[-1]) for rank in range(ranks)])
    stock_heads = -(-heads // ranks)
    try:
        parts = division(plan, stock_heads=stock_heads, **options)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        return
    vector = 2 * 64 * 2
    assert parts.total_bytes == options["total_tokens"] * stock_heads * vector * 2
    used = parts.pool_bytes + parts.table_bytes + parts.arena_pages * parts.page_bytes
    if options["recent_bytes"]:  # the queries of the last output tokens of each row and lane
        recent = (parts.max_requests + 1) * lanes * options["recent_bytes"]
        assert np.array_equal(parts.recent_bytes, recent)
        assert np.all(recent <= parts.total_bytes / 16)
        assert f"last tokens {recent[0] / (1 << 20):.1f} MiB" in parts.describe(0, 1)
        used = used + recent
    else:
        assert parts.recent_bytes is None and "last tokens" not in parts.describe(0, 1)
    assert np.all(used <= parts.total_bytes)
    # Nothing is left over that a page would fit in.
    assert np.all(parts.total_bytes - used < parts.page_bytes + RUN_BYTES)
    assert np.all(parts.arena_pages >= LEAST_PAGES * lanes)
    assert parts.page_bytes == PAGE_TOKENS * vector
    assert parts.pool_tokens > 0 and parts.pool_tokens % options["page_size"] == 0
    slots = parts.pool_tokens + options["page_size"]
    # SGLang's own pool with its even split, whatever lanes the plan gives the rank.
    assert parts.pool_bytes == slots * stock_heads * 2 * vector
    assert 1 <= parts.max_requests <= options["max_requests"]
    assert parts.max_head_tokens <= options["context_len"]
    assert parts.max_pages * PAGE_TOKENS >= parts.max_head_tokens + 1
    rows = (parts.max_requests + 1) * lanes * -(-parts.max_pages // RUN_PAGES) * 4
    assert np.array_equal(parts.table_bytes, rows + parts.arena_pages * RUN_BYTES)
    assert np.all(rows <= parts.total_bytes / 128)
    for rank in range(ranks):
        text = parts.describe(rank, int(lanes[rank]))
        assert "\n" not in text and f"{parts.pool_tokens} tokens" in text
        assert f"pool {parts.pool_bytes / (1 << 20):.1f} MiB" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefill_pool": 19_990}, "smaller --fairkv-prefill-pool"),
        ({"prefill_pool": 10**9}, "smaller --fairkv-prefill-pool"),
        ({"page_size": 64, "prefill_pool": 63}, "prefill pool of 0 tokens"),
        ({"context_len": 10**9}, "smaller --fairkv-max-head-tokens"),
        ({"prefill_pool": 1}, "a prefill pool of 1 tokens holds no prompt.* at least 65"),
        ({"page_size": 16, "prefill_pool": 64}, "64 tokens holds no prompt.* at least 80"),
        ({"max_head_tokens": 1}, "--fairkv-max-head-tokens at least 64"),
        ({"max_head_tokens": 511, "sliding_window": 512}, "no sliding window.* at least 512"),
        ({"arena_pages": 11}, "room for 11 head pages"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(options: dict, says: str) -> None:
    plan = Plan.from_shares(np.ones((2, 1, 2)), "one")  # four lanes
    with pytest.raises(ValueError, match=says) as caught:
        division(plan, **options)
    assert "\n" not in str(caught.value)


def test_more_lanes_cost_page_tables_and_nothing_else() -> None:
    shares = np.zeros((1, 2, 4))
    shares[0, 0, :3], shares[0, 1, 3] = 1, 1
    parts = division(Plan.from_shares(shares, "uneven"), stock_heads=2)
    pages = parts.arena_pages
    rows = parts.table_bytes - pages * RUN_BYTES
    assert rows[0] == 3 * rows[1] and parts.page_bytes == 4096
    assert abs(pages[1] - pages[0] - (rows[0] - rows[1]) / (4096 + RUN_BYTES)) < 1
    even = division(Plan.from_shares(np.repeat(np.eye(2), 2, 1)[None], "even"), stock_heads=2)
    assert even.pool_bytes == parts.pool_bytes and even.pool_tokens == parts.pool_tokens


def test_the_arena_can_be_given() -> None:
    plan = Plan.from_shares(np.ones((2, 1, 2)), "one")
    assert division(plan, arena_pages=12).arena_pages.tolist() == [12]


def llama_8b(context: int, **options: int) -> MemoryDivision:
    """On one GPU of 80 GB: 56 GB for KV, chunks of 8,192 tokens."""
    model = PRESETS["llama-3.1-8b"]
    token_bytes = 2 * model.head_dim * 2 * model.num_kv_heads * model.num_layers
    return divide_memory(
        lane_slots=np.full((model.num_layers, 1), model.num_kv_heads),
        total_tokens=56 * 10**9 // token_bytes,
        stock_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype_bytes=2,
        page_size=1,
        context_len=context,
        pass_tokens=8192,
        max_requests=2048,
        **options,
    )


@pytest.mark.parametrize(
    ("context", "pool", "tables", "requests"),
    [(131_072, 0.326, 0.0130, 831), (32_768, 0.096, 0.0118, 2048), (8_192, 0.0625, 0.0085, 2048)],
)
def test_what_an_8b_model_has_left_for_head_pages(
    context: int, pool: float, tables: float, requests: int
) -> None:
    """Figures of docs/performance.md; page tables with an entry for each page took 6.25 %."""
    parts = llama_8b(context)
    shares = [x / parts.total_bytes for x in (parts.pool_bytes, parts.table_bytes[0])]
    assert shares == pytest.approx([pool, tables], abs=5e-4)
    assert parts.max_requests == requests
    assert parts.pool_tokens >= context + 8192


def test_the_pool_has_room_for_what_the_scheduler_needs() -> None:
    assert default_pool(10**6, 131_072, 8192) == 131_072 + 8192  # the longest, and a pass
    assert default_pool(10**6, 40_000, 2**15) == 2**15 + 40_000
    assert default_pool(10**6, 2048, 2048) == 62_500  # the rest caches prefixes
    assert default_pool(100_000, 131_072, 8192) == 50_000  # half at most
    assert most_of_a_pass(2048, 16_384) == 2048
    assert [most_of_a_pass(off, 16_384) for off in (None, 0, -1)] == [16_384] * 3
    assert most_of_a_pass(None, None) == 0


def test_tables_take_what_the_division_says() -> None:
    parts = division(Plan.from_shares(np.ones((2, 1, 2)), "one"))
    pages = HeadPages.create(
        int(parts.arena_pages[0]), parts.max_requests + 1, 4, parts.max_pages, 64, torch.bfloat16
    )
    taken = pages.page_table.nbytes + pages.runs.nbytes
    assert taken == parts.table_bytes[0]
    assert pages.max_pages >= parts.max_pages

# SPDX-License-Identifier: Apache-2.0
"""What SGLang reports as its load, with its own types."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from sglang.srt.managers.load_snapshot import LoadSnapshot, MemoryMetrics
from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats

import fairkv_sglang.patches.rank
from fairkv_sglang.budgets import BudgetSpec, make_scope
from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.memory.rows import RowBook
from fairkv_sglang.patches import loads
from fairkv_sglang.placement import make_plan
from fairkv_tests.core_cases import make_books

LAYERS, HEADS = 2, 4


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> RowBook:
    """Of rank 0 of two, with 128 pages each for 4 lanes: 512 tokens."""
    scorer = FairKVConfig(enabled=True, scope="uniform").make_scorer()
    budget = BudgetSpec(None, 0.25, None, None)
    scope = make_scope("uniform", budget, LAYERS, HEADS, scorer, None)
    plan = make_plan("contiguous", np.ones((LAYERS, HEADS)), 2)
    book: RowBook = make_books(plan, scope, np.array([128, 128]))[0]
    rank = SimpleNamespace(book=book)
    monkeypatch.setattr(fairkv_sglang.patches.rank, "_rank", rank)
    return book


def snapshot() -> LoadSnapshot:
    """Of a pool of 10,000 slots that prompts hold none of; 1,000 tokens wait."""
    memory = MemoryMetrics(weight_gb=1.0, kv_cache_gb=1.0, graph_gb=0.0, token_capacity=10_000)
    return LoadSnapshot(
        num_total_tokens=1000, num_active_tokens=1000, max_total_num_tokens=10_000, memory=memory
    )


def test_requests_that_decode_are_load(book: RowBook) -> None:
    book.admit(1, 1024)  # keeps 256 tokens of each head
    load = loads.after_get_loads(snapshot())
    assert (load.num_used_tokens, load.max_total_num_tokens, load.token_usage) == (256, 512, 0.5)
    assert load.num_total_tokens == load.num_active_tokens == 256 + 250  # a quarter of those
    assert load.memory is not None and load.memory.token_capacity == 512
    assert load.to_dict({"core"})["num_used_tokens"] == 256  # what /v1/loads answers


def test_the_metric_is_that_of_the_fuller_of_both(book: RowBook) -> None:
    book.admit(1, 1024)
    for pool_usage, told in ((0.0, 0.5), (0.75, 0.75)):
        pool = PoolStats(0, pool_usage, 0, 0)
        stats = SimpleNamespace()
        pool.update_scheduler_stats(stats)
        loads.after_update_stats(None, pool, stats)
        assert stats.token_usage == told
        assert stats.full_token_usage == pool_usage

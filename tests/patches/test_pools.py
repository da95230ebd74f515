# SPDX-License-Identifier: Apache-2.0
"""Pools and backends: SGLang's own, with the head pages beside them."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import sglang.srt.distributed
import sglang.srt.runtime_context as context
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

import fairkv_sglang.patches.rank
from fairkv_sglang.attention.decoders import PageTableDecoder
from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.patches import pools, registries
from fairkv_sglang.patches.attention_backend import FairKVAttnBackend
from fairkv_sglang.patches.ledger import HookError
from fairkv_sglang.placement import Plan
from fairkv_sglang.plan_file import PLAN_VARIABLE
from fairkv_tests.compress_cases import LAYERS, Model, Rank, settle
from fairkv_tests.core_cases import random_plan


@pytest.fixture(autouse=True)
def _no_rank_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairkv_sglang.patches.rank, "_rank", None)


def rank_of(folder: Path, tp_size: int = 1, rank: int = 0) -> Rank:
    plan = random_plan(np.random.default_rng(0), LAYERS, tp_size, 4)
    config = settle(folder, Model(), plan, scope="layer", ratio=0.4)
    return Rank(config, Model(), tp_size, rank, (rank, tp_size) if tp_size > 1 else None)


def configured(**pool: Any) -> SimpleNamespace:
    """What SGLang's configurator returns; remembers the auxiliary cache."""
    table = SimpleNamespace(attached=[])
    table.attach_aux_cache = table.attached.append
    return SimpleNamespace(token_to_kv_pool=SimpleNamespace(**pool), req_to_token_pool=table)


CONFIGURATOR = SimpleNamespace(kv_cache_dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("layout", ["hnd", "vectorized"])
def test_a_pool_that_kept_rows_cannot_be_read_from_is_refused(layout: str) -> None:
    result = configured(kv_cache_layout=layout)
    with pytest.raises(RuntimeError, match=f"NHD KV layout, found {layout}: unset SGLANG_USE_HND"):
        pools.after_configure(result, CONFIGURATOR)
    assert not result.req_to_token_pool.attached


@pytest.mark.parametrize("pool", [{}, {"kv_cache_layout": "nhd"}], ids=["older", "nhd"])
def test_head_pages_are_attached_to_the_request_table(pool: dict, tmp_path: Path) -> None:
    state = rank_of(tmp_path).state
    result = configured(**pool)
    assert pools.after_configure(result, CONFIGURATOR) is None
    assert result.req_to_token_pool.attached == [state.book]
    assert state.book.pages.lanes == state.heads.num_lanes


def test_the_layout_is_named_as_sglang_names_it() -> None:
    assert "kv_cache_layout" in inspect.signature(MHATokenToKVPool.__init__).parameters


def test_pools_without_a_division_are_refused(tmp_path: Path) -> None:
    del rank_of(tmp_path).state.division
    with pytest.raises(RuntimeError, match=r"no division yet; the hook .* did not take effect"):
        pools.after_configure(configured(), CONFIGURATOR)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_sglangs_pool_gets_a_part_of_the_memory(tp_size: int, tmp_path: Path) -> None:
    """Sizes follow SGLang's own heads per rank; the plan says how many lanes share the rest."""
    state = rank_of(tmp_path, tp_size, tp_size - 1).state
    result = SimpleNamespace(max_total_num_tokens=30_000, max_running_requests=20)
    model = SimpleNamespace(context_len=128, get_num_kv_heads=lambda ranks: 4 // ranks)
    configurator = SimpleNamespace(model_config=model, kv_cache_dtype=torch.float16)
    with (
        mock.patch.object(context, "get_parallel", lambda: SimpleNamespace(attn_tp_size=tp_size)),
        mock.patch.object(
            context,
            "get_schedule",
            lambda: SimpleNamespace(page_size=1, chunked_prefill_size=-1, max_prefill_tokens=64),
        ),
    ):
        assert pools.after_resolve_pool_config(result, configurator) is result
    parts = state.division
    assert result.max_total_num_tokens == parts.pool_tokens < 30_000
    assert result.max_running_requests == parts.max_requests <= 20
    row = 4 // tp_size * LAYERS * 2 * 8 * 2
    assert parts.total_bytes == 30_000 * row
    assert parts.pool_bytes == (parts.pool_tokens + 1) * row


def test_a_parent_without_hooks_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLAN_VARIABLE, raising=False)
    with (
        mock.patch.object(pools, "verify", list),
        mock.patch.object(pools, "from_environment", FairKVConfig),
        pytest.raises(HookError, match="resolve_once did not take effect"),
    ):
        pools.before_load_model(SimpleNamespace())


class Prefill(AttentionBackend):
    """SGLang's backend as far as the wrapper reads it."""

    needs_cpu_seq_lens = True
    extend_dummy_seqs_capped_by_req_pool = True

    def __init__(self) -> None:
        super().__init__()
        self.data_type = "bf16"


@pytest.mark.parametrize("tp_size", [1, 2])
def test_sglangs_backend_stays_inside(tp_size: int, tmp_path: Path) -> None:
    rank = rank_of(tmp_path, tp_size)
    verified: list[int] = []
    runner = SimpleNamespace(
        device="cpu",
        req_to_token_pool=SimpleNamespace(req_to_token=rank.table),
        token_to_kv_pool=object(),
        model=torch.nn.Module(),  # without rotary embeddings, which snapkv does not need
    )
    group, prefill = SimpleNamespace(device_group=(0, tp_size)), Prefill()
    with (
        mock.patch.object(sglang.srt.distributed, "get_tp_group", lambda: group),
        mock.patch.object(registries, "verify", lambda: verified.append(1)),
    ):
        backend = registries.after_build_backend(prefill, model_runner=runner, draft=None)
    assert type(backend) is FairKVAttnBackend and isinstance(backend, AttentionBackend)
    assert backend.prefill is prefill and type(backend.decoder) is PageTableDecoder
    assert backend.token_to_kv_pool is runner.token_to_kv_pool
    assert backend.compressor.hand_over.group == (None if tp_size == 1 else (0, tp_size))
    assert verified == [1]
    for name in ("needs_cpu_seq_lens", "extend_dummy_seqs_capped_by_req_pool", "data_type"):
        assert getattr(backend, name) == getattr(prefill, name)
    assert rank.state.backend is backend


def test_a_rank_without_its_hooks_does_not_serve(tmp_path: Path) -> None:
    def lost() -> list[str]:
        raise HookError("hook x did not take effect")

    rank_of(tmp_path)
    with (
        mock.patch.object(registries, "verify", lost),
        pytest.raises(HookError, match="hook x"),
    ):
        registries.after_build_backend(Prefill(), model_runner=SimpleNamespace(device="cpu"))


def test_one_plan_for_all_ranks(tmp_path: Path) -> None:
    """Homes come from counts alone, so that a plan file cannot disagree with SGLang's split."""
    ranks = [rank_of(tmp_path, 2, rank) for rank in range(2)]
    assert len({rank.state.in_force.plan.digest for rank in ranks}) == 1
    assert [rank.home for rank in ranks] == [[0, 1], [2, 3]]
    assert all(rank.state.scope.home_size == 2 for rank in ranks)
    assert isinstance(ranks[0].state.in_force.plan, Plan)

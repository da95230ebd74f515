# SPDX-License-Identifier: Apache-2.0
"""FairKV's prefix cache on SGLang's own pools and scheduling policies, with and without a tree."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import sglang  # noqa: F401  brings its platform, which must precede its other modules
import torch
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import (
    CacheAgnosticPolicy,
    CacheAwarePolicy,
    SchedulePolicy,
)
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.sampling.sampling_params import SamplingParams

from fairkv_sglang.budgets import AS_SERVER, BudgetSpec, Keep
from fairkv_sglang.config.request_options import RequestOptions
from fairkv_sglang.patches.prefix_cache import FairKVRadixCache
from fairkv_sglang.patches.request_options import asked
from fairkv_sglang.patches.scheduling import around_add_request
from fairkv_sglang.patches.spills import mark_spilled

POLICIES = [*CacheAwarePolicy, *CacheAgnosticPolicy]


def make_cache(disable: bool) -> FairKVRadixCache:
    """Over small pools of SGLang's."""
    pool = MHATokenToKVPool(
        size=64, page_size=1, dtype=torch.float32, head_num=1, head_dim=4, layer_num=1,
        device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    allocator = TokenToKVPoolAllocator(
        64, dtype=torch.float32, device="cpu", kvcache=pool, need_sort=False
    )
    rows = ReqToTokenPool(size=4, max_context_len=64, device="cpu", enable_memory_saver=False)
    return FairKVRadixCache(
        CacheInitParams(
            disable=disable,
            req_to_token_pool=rows,
            token_to_kv_pool_allocator=allocator,
            page_size=1,
            tree_components=(ComponentType.FULL,),
        ),
        book=None,  # type: ignore[arg-type]
        window=8,
    )


def request(rid: str, tokens: list[int]) -> Req:
    return Req(rid, "", array("q", tokens), SamplingParams(max_new_tokens=4))


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without disaggregation."""
    settings = SimpleNamespace(disaggregation_mode="null", radix_eviction_policy="lru")
    for name in ("get_disagg", "get_memory"):  # the second from 0.5.22 on
        monkeypatch.setattr(schedule_policy, name, lambda: settings, raising=False)


@pytest.mark.parametrize("disable", [False, True], ids=["tree", "no-tree"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.value)
def test_every_scheduling_policy_orders_requests(policy: Any, disable: bool, process: None) -> None:
    """As with SGLang's own cache; without a tree it takes those that look at one as `fcfs`."""
    cache = make_cache(disable)
    if disable and policy.value == "shortest-prefill-first":
        with pytest.raises(ValueError, match="schedule_policy"):  # SGLang's own refusal
            SchedulePolicy(policy.value, cache, False, False, False)
        return
    chosen = SchedulePolicy(policy.value, cache, False, False, False)
    aware = isinstance(policy, CacheAwarePolicy)
    assert chosen.policy == (CacheAgnosticPolicy.FCFS if disable and aware else policy)
    waiting = [request("a", [1, 2, 3] * 8), request("b", [4, 5] * 12), request("c", [1, 2, 3] * 9)]
    chosen.calc_priority(waiting)
    assert {req.rid for req in waiting} == {"a", "b", "c"}


def test_a_fixed_output_is_admitted_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tree SGLang would keep slots of the pool for it. And by what it wants kept."""
    parameters = SimpleNamespace(ignore_eos=True, custom_params={"fairkv": '{"budget": 50}'})
    req = SimpleNamespace(sampling_params=parameters)
    seen: list[Any] = []
    admission = SimpleNamespace(certain=None)
    book = SimpleNamespace(admission=admission)
    rank = SimpleNamespace(book=book, repeats=None, role="null")
    monkeypatch.setattr("fairkv_sglang.patches.rank._rank", rank)

    def add(adder: Any, req: Any, **kwargs: Any) -> str:
        seen.append((adder, req.sampling_params.ignore_eos, kwargs, asked()))
        return "admitted"

    assert around_add_request(add, "adder", req, has_chunked_req=False) == "admitted"
    wanted = Keep(BudgetSpec(tokens=50))
    assert seen == [("adder", False, {"has_chunked_req": False}, wanted)]
    assert parameters.ignore_eos and asked() == AS_SERVER

    def fail(*args: Any) -> None:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        around_add_request(fail, "adder", req)
    assert parameters.ignore_eos and asked() == AS_SERVER and admission.certain is False
    mark_spilled(req)  # it may take no chance again
    around_add_request(add, "adder", req)
    assert admission.certain is True and req.is_retracted


@pytest.mark.parametrize(
    ("scorer", "server", "most"),
    [
        (None, 8, 12),
        ("keydiff", 8, 12),  # what the server's scorer needs is computed in any case
        ("tova", 8, 9),
        ("h2o", 8, 0),
        ("tova", 15, 5),
    ],
)
def test_a_request_with_its_own_scorer_takes_less_of_a_cached_prefix(
    scorer: str | None, server: int, most: int
) -> None:
    """Its queries have to be computed; what a chunk has just stored is found all the same."""
    windows = {"tova": 11, "keydiff": 3, "h2o": 3}
    cache = make_cache(False)
    cache.window = server
    tokens = list(range(1, 21))
    cache.insert(InsertParams(key=RadixKey(array("q", tokens)), value=torch.arange(20)))
    req = request("a", tokens)
    if scorer is not None:
        own = RequestOptions(scorer={"name": scorer, "window": windows[scorer]})
        req.sampling_params.custom_params = {"fairkv": own.to_text()}
    req.init_next_round_input(cache)
    assert len(req.prefix_indices) == most
    schedule_policy.match_prefix_for_req(cache, req, include_req=True)
    assert len(req.prefix_indices) == most
    with cache._stores():
        found = cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens)), req=req))
    assert len(found.device_indices) == 20

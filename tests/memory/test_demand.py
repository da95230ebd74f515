# SPDX-License-Identifier: Apache-2.0
"""Page bounds hold whatever the scores and whoever owns the copies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.budgets import BudgetSpec, make_scope, make_scorer
from fairkv_sglang.memory import PAGE_TOKENS, PageDemand
from fairkv_sglang.memory.admission import Admission
from fairkv_sglang.model import Sliding
from fairkv_sglang.placement import Plan, Router
from fairkv_sglang.profiles.recorder import Recorder
from fairkv_tests.core_cases import (
    QUICK,
    SCOPES,
    kept_counts,
    pages_by_rank,
    random_owners,
    random_plan,
    random_scope,
    random_scores,
    seeds,
    splits,
)


@pytest.mark.parametrize("name", SCOPES)
@settings(QUICK, max_examples=80)
@given(seed=seeds, split=splits, prompt_len=st.integers(1, 220))
def test_no_scores_need_more_pages_than_the_bound(
    name: str, seed: int, split: tuple[int, int], prompt_len: int
) -> None:
    rng = np.random.default_rng(seed)
    heads, ranks = split
    plan = random_plan(rng, 2, ranks, heads)
    scope = random_scope(rng, name, 2, heads, ranks)
    demand = PageDemand(scope, plan.shares() > 0)
    owners = random_owners(rng, plan)
    scores = [random_scores(rng, heads, prompt_len, scope.window) for _ in range(2)]
    kept = kept_counts(scope, plan, prompt_len, scores)
    actual = pages_by_rank(kept, owners, ranks)
    bound = demand.with_owners(prompt_len, owners)
    anyone = demand.lone_request(prompt_len) - demand.lanes
    assert np.all(actual <= bound), (actual, bound)
    assert np.all(bound <= anyone)
    if not scope.input_dependent:
        assert np.array_equal(actual, bound)
    if ranks == 1:
        assert np.array_equal(bound, anyone)


@settings(QUICK, max_examples=80)
@given(seed=seeds, split=splits, prompt_len=st.integers(1, 220))
def test_scope_rank_is_bounded_by_home_group(
    seed: int, split: tuple[int, int], prompt_len: int
) -> None:
    """Whoever owns them, the heads of one home keep their sum; a part of them at most the rest."""
    rng = np.random.default_rng(seed)
    heads, ranks = split
    plan = random_plan(rng, 2, ranks, heads)
    scope = random_scope(rng, "rank", 2, heads, ranks)
    owners = random_owners(rng, plan)
    size, budget = scope.home_size, scope.budget(prompt_len)
    floor = min(scope.window + scope.floor(prompt_len), budget)
    bound = PageDemand(scope, plan.shares() > 0).with_owners(prompt_len, owners)
    for rank in range(ranks):
        pages = 0
        for layer in range(2):
            mine = np.flatnonzero(owners[layer] == rank)
            members = np.bincount(mine // size, minlength=heads // size)
            # The others of a group keep at least their floors.
            tokens = sum(
                min(n * prompt_len, size * budget - (size - n) * floor) for n in members if n
            )
            pages += (tokens + (PAGE_TOKENS - 1) * len(mine)) // PAGE_TOKENS
        assert bound[rank] <= pages


def test_heads_of_two_homes_on_one_rank() -> None:
    """By hand: 4 heads, 2 ranks, budget 36 of 200, no floor beyond a window of 4."""
    plan = Plan.from_shares(np.full((1, 2, 4), 0.5), "both have all")
    spec = BudgetSpec(tokens=36)
    scorer = make_scorer("streaming", sink=0, window=4)
    scope = make_scope("rank", spec, 1, 4, scorer, floor_alpha=0.0)
    scope.home_size = 2
    demand = PageDemand(scope, plan.shares() > 0)
    whole = (2 * 36 + 2 * 15) // 16  # two heads of one home keep 72 tokens
    apart = 2 * 5  # one of each home: either may keep 4 + 64, 5 pages
    assert demand.with_owners(200, np.array([[0, 0, 1, 1]])).tolist() == [whole, whole]
    assert demand.with_owners(200, np.array([[0, 1, 0, 1]])).tolist() == [apart] * 2
    assert demand.with_owners(200, np.array([[0, 0, 0, 0]])).tolist() == [(144 + 60) // 16, 0]
    assert (demand.lone_request(200) - demand.lanes).tolist() == [(144 + 60) // 16] * 2


@settings(QUICK, max_examples=30)
@given(seed=seeds, split=splits)
def test_lanes_count_copies(seed: int, split: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    heads, ranks = split
    plan = random_plan(rng, 3, ranks, heads)
    demand = PageDemand(random_scope(rng, "uniform", 3, heads, ranks), plan.shares() > 0)
    lanes = [sum(len(plan.heads(layer, rank)) for layer in range(3)) for rank in range(ranks)]
    assert demand.lanes.tolist() == lanes
    growth = demand.growth(16 * 7)
    assert np.all(growth <= 7 * demand.lanes)
    assert 7 * 3 * heads <= growth.sum() <= 7 * 3 * heads + ranks  # each rank's is rounded up


@settings(QUICK, max_examples=60)
@given(
    seed=seeds,
    split=splits,
    name=st.sampled_from(["uniform", "head", "layer", "rank", "model"]),
    prompt_len=st.integers(1, 600),
)
def test_no_lanes_within_the_slots_need_more_than_the_bound_of_any_plan(
    seed: int, split: tuple[int, int], name: str, prompt_len: int
) -> None:
    rng = np.random.default_rng(seed)
    heads, ranks = split
    slots = int(rng.integers(-(-heads // ranks), heads + 1))
    scope = random_scope(rng, name, 2, heads, ranks)
    scope.home_size = max(1, heads // ranks)
    capacity = np.full((2, ranks), slots)
    demand = PageDemand(scope, np.ones((2, ranks, heads), dtype=bool), capacity)
    bound, lanes = demand.under_any_plan(prompt_len), demand.most_lanes
    for _ in range(5):
        served = np.zeros((2, ranks, heads), dtype=bool)
        for layer in served:
            for rank in layer:
                rank[rng.permutation(heads)[: int(rng.integers(1, slots + 1))]] = True
        demand.set_lanes(served)
        assert np.all(demand.lone_request(prompt_len) <= bound)
        assert np.all(demand.lanes <= lanes)


def test_lanes_with_a_sliding_window_stop_growing() -> None:
    """Two of three layers have a window of 40, two heads each, on one rank."""
    scorer = make_scorer("streaming", sink=0, window=4)
    sliding = Sliding(40, (0, 2))
    scope = make_scope("uniform", BudgetSpec(tokens=64), 3, 2, scorer, None, sliding)
    demand = PageDemand(scope, np.ones((3, 1, 2), dtype=bool))
    assert demand.lanes.tolist() == [6]
    # of one request: 64 tokens in 2 lanes, 40 in 4
    assert demand.growth(64).tolist() == [2 * 4 + 4 * 40 // 16]
    # of many: at most what the windows have left
    assert demand.growth(64, np.array([5])).tolist() == [2 * 4 + 5]
    assert demand.growth(64, np.array([500])).tolist() == [2 * 4 + 4 * 4]
    # While its windows are filling, a request takes a page in each lane every 16 tokens, then in
    # two. A prompt of 10 tokens holds a page of each window, which takes two more.
    assert demand.output(np.array([12]), 10) == 32
    assert demand.output(np.array([12 + 4]), 10) == 16 * (16 - 4 * 3) // 2
    assert demand.output(np.array([4 * 3 + 200]), 10) == 16 * 100
    assert demand.output(np.array([4 + 200]), 1000) == 16 * 100


def test_a_window_that_slides_takes_no_more_pages_than_it_has() -> None:
    scorer = make_scorer("streaming", sink=0, window=4)
    scope = make_scope("uniform", BudgetSpec(tokens=64), 2, 1, scorer, None, Sliding(40, (1,)))
    plan = Plan.from_shares(np.ones((2, 1, 1)), "one rank")
    demand = PageDemand(scope, plan.shares() > 0)
    admission = Admission(scope, demand, Router(plan), Recorder(2, 1, 4))
    asked = admission.ask(100)
    assert asked.expected.tolist() == [[64], [39]]
    assert asked.lasting(16).tolist() == [4 + 1 + 3]
    assert asked.lasting(1000).tolist() == [4 + 63 + 3]

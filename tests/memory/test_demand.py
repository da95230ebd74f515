# SPDX-License-Identifier: Apache-2.0
"""Page bounds hold whatever the scores and whoever owns the copies."""

from __future__ import annotations

import numpy as np
import pytest
from core_cases import (
    QUICK,
    SCOPES,
    kept_counts,
    pages_by_rank,
    random_owners,
    random_plan,
    random_scope,
    random_scores,
    seeds,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.memory import PageDemand


@pytest.mark.parametrize("name", SCOPES)
@settings(QUICK, max_examples=80)
@given(seed=seeds, ranks=st.integers(1, 3), prompt_len=st.integers(1, 220))
def test_no_scores_need_more_pages_than_the_bound(
    name: str, seed: int, ranks: int, prompt_len: int
) -> None:
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, 2, ranks, 5, copies=name != "rank")
    scope = random_scope(rng, name, 2, 5)
    demand = PageDemand(scope, plan)
    owners = random_owners(rng, plan)
    scores = [random_scores(rng, 5, prompt_len, scope.window) for _ in range(2)]
    kept = kept_counts(scope, plan, prompt_len, scores)
    actual = pages_by_rank(kept, owners, ranks)
    bound = demand.with_owners(prompt_len, owners)
    anyone = demand.any_owner(prompt_len)
    assert np.all(actual <= bound), (actual, bound)
    assert np.all(bound <= anyone)
    assert np.array_equal(demand.lone_request(prompt_len), anyone + demand.lanes)
    if not scope.input_dependent:
        assert np.array_equal(actual, bound)
    if ranks == 1:
        assert np.array_equal(bound, anyone)


@settings(QUICK, max_examples=30)
@given(seed=seeds, ranks=st.integers(1, 4))
def test_lanes_count_copies(seed: int, ranks: int) -> None:
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, 3, ranks, 4)
    demand = PageDemand(random_scope(rng, "uniform", 3, 4), plan)
    lanes = [sum(len(plan.heads(layer, rank)) for layer in range(3)) for rank in range(ranks)]
    assert demand.lanes.tolist() == lanes
    assert demand.expected_lanes.sum() == pytest.approx(3 * 4)
    assert np.all(demand.expected_lanes <= demand.lanes + 1e-9)

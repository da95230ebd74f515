# SPDX-License-Identifier: Apache-2.0
"""Heads stay at home where that costs nothing: equal steps, even memory, limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.placement import POLICIES, CostModel, PlanOptions, make_plan
from fairkv_sglang.placement.homes import Homes
from fairkv_sglang.placement.make import figures, make_problem
from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.placement.solver.deal import EVEN, EVENER, deal
from fairkv_sglang.placement.solver.problem import Problem
from fairkv_sglang.placement.solver.stay import SAME, stay_home, twin_lanes

SPLITS = st.sampled_from([(8, 2), (8, 4), (8, 8), (4, 8), (2, 4), (1, 3), (12, 3), (6, 3)])
COSTS = st.sampled_from([None, *(CostModel.for_device(d, batch=64) for d in ("cuda", "cpu"))])
NO_OPTIONS = PlanOptions()


def some_loads(seed: int, layers: int, heads: int) -> FloatArray:
    rng = np.random.default_rng(seed)
    loads = rng.lognormal(6.0, rng.uniform(0.0, 1.5), (layers, heads))
    loads[rng.random(loads.shape) < 0.1] = 0.0
    return loads


def some_shares(seed: int, problem: Problem) -> FloatArray:
    """Any shares that serve every head and leave no rank without one."""
    rng = np.random.default_rng(seed)
    shape = (problem.layers, problem.ranks, problem.heads)
    shares = rng.random(shape) * (rng.random(shape) < 0.3)
    turn = np.arange(max(problem.ranks, problem.heads))
    shares[:, turn % problem.ranks, turn % problem.heads] += 0.1
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def rows_at_home(problem: Problem, shares: FloatArray) -> float:
    home = Homes(problem.heads, problem.ranks).at_home
    return float(np.einsum("lrh,lh,rh->", shares, problem.tokens, home))


def dealt(problem: Problem, shares: FloatArray) -> FloatArray:
    return deal(problem, [[layer] for layer in shares])


def evened(problem: Problem, shares: FloatArray) -> FloatArray:
    """Largest parts to the emptiest ranks, layers with the widest spread first."""
    out, held = shares.copy(), np.zeros(problem.ranks)
    tokens = np.einsum("lrh,lh->lr", shares, problem.tokens)
    for layer in np.argsort(-np.ptp(tokens, axis=1), kind="stable"):
        ranks = np.argsort(held, kind="stable")
        out[layer, ranks] = shares[layer, np.argsort(-tokens[layer], kind="stable")]
        held[ranks] += -np.sort(-tokens[layer])
    return out


def fullest(problem: Problem, shares: FloatArray) -> float:
    totals = np.einsum("lrh,lh->r", shares, problem.tokens)
    return float(totals.max() / max(totals.mean(), 1e-300))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), split=SPLITS, cost=COSTS, own=st.booleans())
def test_staying_home_costs_no_time(
    seed: int, split: tuple[int, int], cost: CostModel | None, own: bool
) -> None:
    """Valid, within 0.1 % of the plan it started from, never fewer rows at home."""
    problem = make_problem(some_loads(seed, 4, split[0]), split[1], cost)
    start = some_shares(seed, problem)
    if own:
        start = make_plan("fair_copying", problem.tokens, split[1], cost).shares()
    plan = stay_home(problem, NO_OPTIONS, start)
    np.testing.assert_allclose(plan.sum(axis=1), 1.0, atol=1e-9)
    assert ((plan > 0).any(axis=2)).all()
    before, after = (problem.rank_costs(x).max(axis=1) for x in (start, plan))
    assert (after <= before * (SAME if problem.lane else 1 + 1e-8)).all()
    assert ((plan > 0).sum(axis=(1, 2)) <= np.maximum(
        (start > 0).sum(axis=(1, 2)), problem.heads + problem.ranks - 1
    )).all()  # fmt: skip
    alike = 1e-6 * problem.tokens.sum()
    if fullest(problem, start) <= EVEN:  # memory is as even then
        assert rows_at_home(problem, plan) >= rows_at_home(problem, start) - alike


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), split=SPLITS, cost=COSTS)
def test_staying_home_leaves_memory_even(
    seed: int, split: tuple[int, int], cost: CostModel | None
) -> None:
    """With the layers of a small model; of few layers there may be no even choice."""
    problem = make_problem(some_loads(seed, 24, split[0]), split[1], cost)
    start = make_plan("fair_copying", problem.tokens, split[1], cost).shares()
    own = fullest(problem, evened(problem, start))
    assert fullest(problem, dealt(problem, start)) <= max(EVEN, EVENER * own) + 1e-9


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), split=SPLITS, layers=st.integers(1, 12))
def test_dealing_keeps_rows_home_and_memory_even(
    seed: int, split: tuple[int, int], layers: int
) -> None:
    problem = make_problem(some_loads(seed, layers, split[0]), split[1])
    start = some_shares(seed, problem)
    plan = dealt(problem, start)
    np.testing.assert_allclose(  # the same parts in each layer
        np.sort(problem.rank_costs(plan), axis=1), np.sort(problem.rank_costs(start), axis=1)
    )
    limit = max(EVEN, EVENER * fullest(problem, evened(problem, start))) + 1e-9
    assert fullest(problem, plan) <= limit
    alike = 1e-6 * problem.tokens.sum()  # twins count where rows are the same
    if fullest(problem, start) <= EVEN:
        assert rows_at_home(problem, plan) >= rows_at_home(problem, start) - alike


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("split", [(8, 2), (8, 4), (8, 8), (4, 8), (2, 8)])
@pytest.mark.parametrize("device", ["cuda", "cpu", None])
def test_equal_loads_stay_where_they_are(
    policy: str, split: tuple[int, int], device: str | None
) -> None:
    cost = None if device is None else CostModel.for_device(device)
    loads = np.full((3, split[0]), 512.0)
    plan = make_plan(policy, loads, split[1], cost)
    assert plan.layers == make_plan("contiguous", loads, split[1], cost).layers
    assert plan.info["home_rows"] == pytest.approx(1.0)
    assert plan.info["twin_bytes"] == plan.info["most_twin_bytes"] == 0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), split=SPLITS)
def test_contiguous_has_no_twins_and_moves_nothing(seed: int, split: tuple[int, int]) -> None:
    info = make_plan("contiguous", some_loads(seed, 3, split[0]), split[1], CostModel()).info
    assert info["home_rows"] == pytest.approx(1.0)
    assert info["twin_bytes"] == info["most_twin_bytes"] == 0


def test_twins_are_counted_where_lanes_differ_from_home() -> None:
    home = Homes(4, 2).at_home
    shares = np.array([[[1, 1, 0, 0], [0, 0, 1, 1]], [[1, 1, 0.5, 0], [0, 0, 0.5, 1]]])
    assert twin_lanes(shares, home).tolist() == [[0, 0], [3, 0]]
    problem = make_problem(np.full((2, 4), 10.0), 2, CostModel())
    info = figures(problem, shares)
    assert info["twin_bytes"] == info["most_twin_bytes"] == 3 * CostModel().slice_bytes
    assert info["home_rows"] == pytest.approx(1 - 5 / 80)


def test_a_split_that_sglang_has_not_is_planned_without_homes() -> None:
    plan = make_plan("fair_copying", some_loads(0, 4, 5), 3, CostModel())
    assert "home_rows" not in plan.info and plan.tp_size == 3


def test_no_copies_where_none_are_allowed() -> None:
    loads = some_loads(3, 8, 8)
    plan = make_plan("fair_copying", loads, 4, CostModel(batch=64), max_copies_per_layer=0)
    assert plan.copy_counts().sum() == 0 and plan.info["home_rows"] > 0.25
    assert make_plan("best_effort", loads, 4, CostModel(batch=64)).copy_counts().sum() == 0

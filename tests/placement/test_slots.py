# SPDX-License-Identifier: Apache-2.0
"""Lane slots: no rank has more lanes in a layer, and that costs little."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fairkv_sglang.placement import POLICIES, CostModel, make_plan
from fairkv_sglang.placement.modelled_step import modelled_step
from fairkv_sglang.placement.options import SPARE_LANES
from fairkv_sglang.placement.solver.lane_search import Support

FAST = sorted(set(POLICIES) - {"exact"})


def some_loads(max_heads: int = 8, layers: int = 2) -> st.SearchStrategy[np.ndarray]:
    """Loads [L, H], zeros and ties included."""
    return hnp.arrays(
        np.float64,
        st.tuples(st.just(layers), st.integers(1, max_heads)),
        elements=st.one_of(
            st.sampled_from([0.0, 1.0, 100.0, 1000.0]), st.floats(0.0, 1e5, allow_subnormal=False)
        ),
    )


costs_ = st.one_of(st.none(), st.floats(0.1, 1e4).map(lambda b: CostModel(batch=b)))


@settings(deadline=None, max_examples=150)
@given(
    loads=some_loads(12),
    ranks=st.sampled_from([1, 2, 3, 4, 5, 8, 9]),
    slots=st.integers(1, 6),
    cost=costs_,
    paid=st.booleans(),
    spread=st.sampled_from([0.0, 0.3]),
    policy=st.sampled_from(FAST),
)
def test_no_rank_has_more_lanes_than_slots(
    loads: np.ndarray,
    ranks: int,
    slots: int,
    cost: CostModel | None,
    paid: bool,
    spread: float,
    policy: str,
) -> None:
    options = {"max_lanes": slots, "paid": paid, "spread": spread}
    if ranks * slots < loads.shape[1]:
        with pytest.raises(ValueError, match=f"do not fit into {slots} lane slots"):
            make_plan(policy, loads, ranks, cost, **options)  # type: ignore[arg-type]
        return
    plan = make_plan(policy, loads, ranks, cost, **options)  # type: ignore[arg-type]
    assert (plan.shares() > 0).sum(axis=2).max() <= slots
    assert plan.info["lane_slots"] == slots


@settings(deadline=None, max_examples=10)
@given(loads=some_loads(4, 1), ranks=st.integers(1, 3), paid=st.booleans())
def test_the_exact_solver_keeps_to_the_slots(loads: np.ndarray, ranks: int, paid: bool) -> None:
    slots = -(-loads.shape[1] // ranks)
    plan = make_plan("exact", loads, ranks, CostModel(), max_lanes=slots, paid=paid)
    assert (plan.shares() > 0).sum(axis=2).max() <= slots


@settings(deadline=None, max_examples=40)
@given(
    loads=some_loads(),
    ranks=st.integers(1, 5),
    cost=costs_,
    spread=st.sampled_from([0.0, 0.3]),
    policy=st.sampled_from(FAST),
)
def test_slots_that_do_not_bind_change_nothing(
    loads: np.ndarray, ranks: int, cost: CostModel | None, spread: float, policy: str
) -> None:
    free = make_plan(policy, loads, ranks, cost, spread=spread)
    bound = make_plan(policy, loads, ranks, cost, spread=spread, max_lanes=loads.shape[1])
    assert bound.layers == free.layers
    assert bound.info == {**free.info, "lane_slots": loads.shape[1]}


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("batch", [32.0, 300.0])
@pytest.mark.parametrize("paid", [True, False])
def test_slots_are_filled_nearly_as_well_as_the_exact_solver_does(
    spare: int, batch: float, paid: bool
) -> None:
    """Splits that SGLang has, heads from even to very uneven."""
    ratios = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        heads, ranks = [(4, 2), (6, 3), (4, 4), (2, 4), (6, 2), (3, 3)][seed % 6]
        loads = rng.lognormal(6.0, rng.uniform(0.3, 1.8), (1, heads))
        options = {"max_lanes": -(-heads // ranks) + spare, "paid": paid, "time_limit": 20.0}
        ours, exact = (
            make_plan(name, loads, ranks, CostModel(batch=batch), **options).info
            for name in ("fair_copying", "exact")
        )
        assert exact["proved"] == [True]
        ratios.append(ours["step_cost"] / exact["step_cost"])
    assert max(ratios) < 1.03
    assert float(np.mean(ratios)) < 1.003


def test_many_ranks_keep_to_their_slots_and_gain() -> None:
    loads = np.random.default_rng(0).lognormal(6.0, 1.0, (4, 32))
    even, ours = (
        make_plan(name, loads, 16, CostModel(batch=128), max_lanes=3)
        for name in ("contiguous", "fair_copying")
    )
    assert (ours.shares() > 0).sum(axis=2).max() <= 3
    assert ours.info["step_cost"] < 0.8 * even.info["step_cost"]


def test_slots_that_are_paid_for_are_in_the_step_and_used() -> None:
    loads = np.random.default_rng(1).lognormal(6.0, 1.0, (6, 8))
    cost = CostModel(batch=8.0)  # a copy does not pay for itself
    plain = make_plan("fair_copying", loads, 8, cost, max_lanes=2)
    paid = make_plan("fair_copying", loads, 8, cost, max_lanes=2, paid=True)
    assert paid.copy_counts().sum() > plain.copy_counts().sum()
    assert paid.info["token_imbalance"] < 1.02 < plain.info["token_imbalance"]
    fixed = 6 * 2 * cost.lane_cost
    tokens = cost.head_cost(np.einsum("lrh,lh->lr", paid.shares(), loads)).max(axis=1).sum()
    assert paid.info["step_cost"] == pytest.approx(fixed + tokens)
    assert paid.info["lane_tokens"] == 0  # weights are the same on all ranks for the router
    with pytest.raises(ValueError, match="need their number, max_lanes"):
        make_plan("fair_copying", loads, 8, cost, paid=True)


@settings(deadline=None, max_examples=60)
@given(
    loads=some_loads(),
    ranks=st.integers(1, 5),
    seed=st.integers(0, 1000),
    cost=costs_,
    paid=st.booleans(),
)
def test_best_shares_are_those_of_max_flow_min_cut(
    loads: np.ndarray, ranks: int, seed: int, cost: CostModel | None, paid: bool
) -> None:
    layers, heads = loads.shape
    rng = np.random.default_rng(seed)
    served = rng.random((layers, ranks, heads)) < 0.5
    served[:, rng.integers(ranks, size=heads), np.arange(heads)] = True
    costs = loads if cost is None else cost.head_cost(loads)
    lane = 0.0 if cost is None or paid else cost.lane_cost
    levels = [
        Support(served[i], costs[i], costs[i][None], lane, heads, heads * ranks).expected_level
        for i in range(layers)
    ]
    fixed = layers * heads * cost.lane_cost if paid and cost is not None else 0.0
    step = modelled_step(served, loads, cost, heads if paid else None)
    assert step == pytest.approx(sum(levels) + fixed, rel=1e-6, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(loads=some_loads(), ranks=st.integers(1, 5), cost=costs_, spread=st.floats(0.0, 0.5))
def test_the_lanes_of_a_plan_cost_no_more_than_the_plan(
    loads: np.ndarray, ranks: int, cost: CostModel | None, spread: float
) -> None:
    plan = make_plan("fair_copying", loads, ranks, cost, spread=spread)
    step = modelled_step(plan.shares() > 0, loads, cost)
    assert step <= plan.info["step_cost"] * (1 + 1e-6) + 1e-6
    assert step >= plan.info["step_lower_bound"] * (1 - 1e-6) - 1e-6


def test_old_lanes_cost_more_under_new_loads() -> None:
    old, new = np.random.default_rng(2).lognormal(6.0, 1.0, (2, 16, 8))
    cost = CostModel(batch=64)
    lanes, better = (make_plan("fair_copying", x, 4, cost).shares() > 0 for x in (old, new))
    assert modelled_step(lanes, new, cost) > 1.05 * modelled_step(better, new, cost)


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (np.ones((2, 3)), "do not fit loads"),
        (np.ones((1, 2, 4)), "do not fit loads"),
        (np.arange(6).reshape(1, 2, 3) > 3, "every head needs a rank"),
    ],
)
def test_lanes_that_do_not_fit_give_one_line(served: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modelled_step(served, np.ones((1, 3)))


@pytest.mark.parametrize("split", [(8, 2), (8, 4), (8, 8), (32, 8), (4, 8)])
@pytest.mark.parametrize("skew", [0.5, 1.0, 2.0])
def test_one_spare_lane_leaves_little_to_gain(split: tuple[int, int], skew: float) -> None:
    heads, ranks = split
    loads = np.exp(skew * np.random.default_rng(0).standard_normal((8, heads))) * 1000
    slots = max(1, heads // ranks) + SPARE_LANES
    cost = CostModel(batch=256, weight_bytes=0.01)  # slots cost next to nothing
    plan = make_plan("fair_copying", loads, ranks, cost, max_lanes=slots, paid=True)
    assert plan.info["step_over_bound"] < 1.02

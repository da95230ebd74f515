# SPDX-License-Identifier: Apache-2.0
"""Plans that keep prefill even: fewer lanes on the rank that has most."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.placement import CostModel, make_plan
from fairkv_sglang.placement.make import make_problem
from fairkv_sglang.placement.options import FloatArray

# One hungry head among seven modest ones: decode alone puts them on ranks of their own.
HUNGRY = np.array([[100.0, 100, 100, 100, 3000, 100, 100, 100]])


def lanes(shares: FloatArray) -> list[list[int]]:
    return [sorted(row) for row in (shares > 0).sum(axis=2).tolist()]


def test_decode_alone_leaves_prefill_uneven() -> None:
    plan = make_plan("fair_copying", HUNGRY, 2)
    assert lanes(plan.shares())[0][1] >= 7


def test_tolerance_makes_lanes_even_at_almost_the_same_decode() -> None:
    plain = make_plan("fair_copying", HUNGRY, 2)
    even = make_plan("fair_copying", HUNGRY, 2, lane_tolerance=1.02)
    assert lanes(even.shares())[0][1] <= 5
    assert even.info["step_cost"] <= plain.info["step_cost"] * 1.02
    assert even.info["lane_imbalance"] < plain.info["lane_imbalance"]


def test_cost_of_prefill_decides_how_many_copies() -> None:
    cost = CostModel.for_device("cuda", batch=32.0)
    hungrier = HUNGRY * 10
    rare = make_plan("fair_copying", hungrier, 2, cost.with_prefill(2048, 1 << 20))
    often = make_plan("fair_copying", hungrier, 2, cost.with_prefill(32768, 8))
    assert rare.copy_counts().sum() > 0
    assert often.copy_counts().sum() == 0
    assert lanes(often.shares()) == [[4, 4]]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    ranks=st.sampled_from([2, 4, 8]),
    prompt=st.sampled_from([0, 1024, 16384]),
)
def test_never_dearer_than_without(seed: int, ranks: int, prompt: int) -> None:
    """Decode stays within the tolerance, or decode and prefill together get no dearer."""
    loads = np.random.default_rng(seed).lognormal(0, 1, (3, 8)) * 500
    plain_cost = CostModel.for_device("cuda", batch=16.0)
    cost = plain_cost.with_prefill(prompt, 256) if prompt else plain_cost
    plain = make_plan("fair_copying", loads, ranks, plain_cost)
    even = make_plan("fair_copying", loads, ranks, cost, lane_tolerance=1.02)
    problem = make_problem(loads, ranks, cost)
    np.testing.assert_allclose(even.shares().sum(axis=1), 1.0)
    before, after = (
        problem.rank_costs(plan.shares()).max(axis=1)
        + problem.prefill * (plan.shares() > 0).sum(axis=2).max(axis=1)
        for plan in (plain, even)
    )
    if prompt:
        assert (after <= before * (1 + 1e-6)).all()
    else:
        assert (after <= before * (1.02 + 1e-6)).all()
        most = [(plan.shares() > 0).sum(axis=2).max(axis=1) for plan in (plain, even)]
        assert (most[1] <= most[0]).all()


def test_limits_on_copies_win() -> None:
    plan = make_plan("fair_copying", HUNGRY, 2, lane_tolerance=1.5, max_copies_per_layer=0)
    assert plan.copy_counts().sum() == 0


def test_spare_copies_leave_lanes_even() -> None:
    loads = np.random.default_rng(5).lognormal(0, 1, (8, 8)) * 500
    plan = make_plan("fair_copying", loads, 2, lane_tolerance=1.1, spread=0.3)
    assert plan.info["spare_copies"] > 0
    rows = np.array(lanes(plan.shares()))
    assert (rows[:, 1] - rows[:, 0] <= 1).all()


def test_what_is_not_weighed_is_said() -> None:
    cost = CostModel.for_device("cuda").with_prefill(4096, 64)
    limited = make_plan("fair_copying", HUNGRY, 2, cost, max_extra_bytes=1e9)
    assert "limited" in limited.info["prefill"]
    assert "best_effort" in make_plan("best_effort", HUNGRY, 2, cost).info["prefill"]
    assert "prefill" not in make_plan("fair_copying", HUNGRY, 2, cost).info


def test_tolerance_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="lane_tolerance"):
        make_plan("fair_copying", HUNGRY, 2, lane_tolerance=0.9)

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fairkv_sglang.placement.solver.choose import _knapsack
from fairkv_sglang.placement.solver.lane_search import Support, balanced_shares
from fairkv_sglang.placement.solver.large_curves import LargeCurves
from fairkv_sglang.placement.solver.small_curves import SmallCurves
from fairkv_sglang.placement.solver.wrap import group_bound, wrap

load_ = st.just(0.0) | st.floats(1e-3, 100.0)
"""Kept tokens. (A half of the smallest number there is rounds to nothing.)"""
loads_ = hnp.arrays(np.float64, st.integers(1, 6), elements=load_)
lanes_ = st.sampled_from([0.0, 0.5, 10.0])


def level_of(loads: np.ndarray, shares: np.ndarray, lane: float) -> float:
    return float((shares @ loads + lane * (shares > 0).sum(axis=1)).max())


@settings(deadline=None)
@given(loads=loads_, ranks=st.integers(1, 5), lane=lanes_)
def test_wrap_serves_every_head_once(loads: np.ndarray, ranks: int, lane: float) -> None:
    shares = wrap(loads, ranks, lane)
    np.testing.assert_allclose(shares.sum(axis=0), 1.0, atol=1e-9)
    assert (shares >= 0).all()
    assert ((shares > 0).sum(axis=1) >= 1).all()
    total = float(loads.sum())
    limit = group_bound(total, len(loads), ranks, lane) + lane
    if total > 0.0:
        assert level_of(loads, shares, lane) <= limit * (1 + 1e-3)


@settings(deadline=None)
@given(loads=loads_.filter(lambda x: x.sum() > 1e-3), ranks=st.integers(1, 5))
def test_wrap_without_lane_cost_is_perfect(loads: np.ndarray, ranks: int) -> None:
    shares = wrap(loads, ranks, 0.0)
    np.testing.assert_allclose(shares @ loads, loads.sum() / ranks, rtol=1e-6)
    assert (shares > 0).sum() <= len(loads) + ranks - 1


@settings(deadline=None)
@given(loads=loads_, ranks=st.integers(1, 5), lane=lanes_)
def test_built_layers_reach_their_level_without_lane_cost_and_come_close_with_it(
    loads: np.ndarray, ranks: int, lane: float
) -> None:
    curves = SmallCurves(loads[None], ranks, lane)
    for copies in np.flatnonzero(np.isfinite(curves.levels[:, 0])):
        shares = curves.build(0, int(copies))
        level = curves.levels[copies, 0]
        reached = level_of(loads, shares, lane)
        assert reached >= level * (1 - 1e-9) - 1e-9 or (shares > 0).sum() < len(loads) + copies
        total, heads = float(loads.sum()), len(loads)
        assert reached <= max(level, group_bound(total, heads, 1, lane)) * 1.001 + lane + 1e-9
        if lane == 0.0:
            assert reached == pytest.approx(level, abs=1e-6)
        assert (shares > 0).sum() - len(loads) <= copies


@settings(deadline=None, max_examples=30)
@given(
    loads=hnp.arrays(np.float64, st.integers(2, 5), elements=load_),
    ranks=st.integers(2, 3),
)
def test_no_copies_is_the_best_of_all_assignments(loads: np.ndarray, ranks: int) -> None:
    heads = len(loads)
    if heads < ranks:
        return
    best = min(
        max(sum(loads[h] for h in range(heads) if where[h] == r) for r in range(ranks))
        for where in product(range(ranks), repeat=heads)
        if len(set(where)) == ranks
    )
    assert SmallCurves(loads[None], ranks, 0.0).levels[0, 0] == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("lane", [0.0, 0.3, 2.0])
@pytest.mark.parametrize(("heads", "ranks"), [(8, 4), (8, 8), (5, 3)])
def test_the_heuristic_comes_close_to_the_exact_curve(heads: int, ranks: int, lane: float) -> None:
    loads = np.random.default_rng(0).lognormal(0, 1, (24, heads))
    exact = np.minimum.accumulate(SmallCurves(loads, ranks, lane).levels)
    large = LargeCurves(loads, ranks, lane)
    found = np.minimum.accumulate(large.levels)
    assert (found >= exact * (1 - 1e-9)).all()
    assert (found / exact).mean() < 1.01
    assert (found[-1] / exact[-1]).max() < 1.05
    for layer in range(len(loads)):
        copies = int(large.levels[:, layer].argmin())
        shares = large.build(layer, copies)
        np.testing.assert_allclose(shares.sum(axis=0), 1.0, atol=1e-9)
        assert level_of(loads[layer], shares, lane) <= large.levels[copies, layer] * 1.02


def test_many_heads_need_few_copies() -> None:
    loads = np.random.default_rng(0).lognormal(0, 1, (8, 64))
    levels = LargeCurves(loads, 8, 0.0).levels
    assert np.median((levels <= 1.02 * loads.sum(axis=1) / 8).argmax(axis=0)) <= 1


@settings(deadline=None, max_examples=40)
@given(
    levels=hnp.arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 4)),
                      elements=st.floats(0.0, 10.0)),
)  # fmt: skip
def test_knapsack_is_exact(levels: np.ndarray) -> None:
    levels = np.minimum.accumulate(levels)
    steps, layers = levels.shape
    best, _ = _knapsack(levels)
    for total in range(len(best)):
        brute = min(
            sum(levels[m, layer] for layer, m in enumerate(pick))
            for pick in product(range(steps), repeat=layers)
            if sum(pick) <= total
        )
        assert np.minimum.accumulate(best)[total] == pytest.approx(brute)


@settings(deadline=None, max_examples=40)
@given(
    loads=hnp.arrays(np.float64, 4, elements=st.floats(1.0, 100.0)),
    seed=st.integers(0, 50),
    lane=lanes_,
)
def test_pouring_reaches_the_level_of_the_best_shares(
    loads: np.ndarray, seed: int, lane: float
) -> None:
    """Max-flow min-cut and the water filling agree on what a support can reach."""
    rng = np.random.default_rng(seed)
    support = rng.random((3, 4)) < 0.6
    support[rng.integers(3, size=4), np.arange(4)] = True
    shares = balanced_shares(loads, support, lane)
    np.testing.assert_allclose(shares.sum(axis=0), 1.0, atol=1e-9)
    assert ((shares > 0) == support).all()
    layer = Support(support, loads, loads[None], lane, 4, 9)  # divisible requests
    reached = level_of(loads, shares, lane)
    assert reached >= layer.level * (1 - 1e-6)
    # every lane keeps 2 % of its head
    assert reached <= layer.level * 1.01 + 0.06 * loads.max()

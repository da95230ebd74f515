# SPDX-License-Identifier: Apache-2.0
"""Medians, paired ratios, order of runs."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairkv_sglang.bench.stats import ratios, rotated, show, spread

numbers = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20)


@given(numbers)
def test_spread_is_ordered_and_has_the_plain_median(values: list[float]) -> None:
    found = spread(values)
    order = [found[key] for key in ("least", "quarter", "median", "three_quarters", "most")]
    assert order == sorted(order)
    assert found["median"] == pytest.approx(statistics.median(values))
    assert (order[0], order[-1], found["count"]) == (min(values), max(values), len(values))


def test_spread_of_nothing_or_of_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one finite value"):
        spread([])
    with pytest.raises(ValueError, match="finite"):
        spread([1.0, float("nan")])


def test_ratios_are_of_pairs_not_of_medians() -> None:
    # a machine that is twice as slow in round 2 changes nothing
    found = ratios([3.0, 6.0], [2.0, 4.0])
    assert found["least"] == found["most"] == 1.5
    with pytest.raises(ValueError, match="in pairs"):
        ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="value 0"):
        ratios([1.0], [0.0])


@given(st.lists(st.integers(), unique=True, max_size=8))
def test_over_all_rounds_each_item_runs_once_at_each_place(items: list[int]) -> None:
    rounds = [rotated(items, index) for index in range(len(items))]
    assert all(sorted(order) == sorted(items) for order in rounds)
    for place in range(len(items)):
        assert {order[place] for order in rounds} == set(items)
    assert rotated(items, len(items)) == items


def test_text_shows_the_extremes_where_there_is_more_than_one_value() -> None:
    assert show(spread([2.0])) == "2.00"
    assert show(spread([1.0, 2.0, 4.0]), 1) == "2.0 [1.0..4.0]"

# SPDX-License-Identifier: Apache-2.0
"""Deterministic top-k and the integer water-filling, on their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.budgets.selection import pick, picked, pooled, pooled_counts, top_mask
from fairkv_sglang.budgets.waterfill import water_fill
from fairkv_tests.budgets_reference import static_kept, water_level


@st.composite
def tied_scores(draw, max_rows=5, max_columns=30):
    """Few different values, infinities among them: ties everywhere."""
    n, m = draw(st.integers(1, max_rows)), draw(st.integers(0, max_columns))
    value = st.sampled_from([0.0, -0.0, 0.5, 1.0, 1.5, -2.0, float("inf"), float("-inf")])
    rows = draw(st.lists(st.lists(value, min_size=m, max_size=m), min_size=n, max_size=n))
    return torch.tensor(rows, dtype=torch.float32).reshape(n, m)


@settings(max_examples=200, deadline=None)
@given(scores=tied_scores(), window=st.integers(0, 5), data=st.data())
def test_pick_keeps_the_best_and_the_window(scores, window, data):
    n, m = scores.shape
    total = m + window
    counts = [data.draw(st.integers(window, total)) for _ in range(n)]
    known = data.draw(st.booleans())
    kept = pick(scores, torch.tensor(counts), total, max(counts) if known else None)
    wanted = static_kept(scores.tolist(), counts, total)
    assert kept.counts.tolist() == counts
    assert kept.indices.shape == (n, max(counts))
    assert kept.indices.dtype == torch.int64
    for row, positions in zip(kept.indices.tolist(), wanted, strict=True):
        assert row == positions + [-1] * (len(row) - len(positions))
    on_device = picked(scores, torch.tensor(counts), total, max(counts))
    assert torch.equal(on_device, kept.indices)


@settings(max_examples=200, deadline=None)
@given(scores=tied_scores(), floor=st.integers(0, 9), extra=st.integers(0, 200), data=st.data())
def test_pooled_counts_of_the_best_entries(scores, floor, extra, data):
    n, m = scores.shape
    floor = min(floor, m)
    total = n * floor + extra
    order = data.draw(st.permutations(range(n)))
    rest = sorted(
        (-value, order.index(row))
        for row, values in enumerate(scores.tolist())
        for value in sorted(values, reverse=True)[floor:]
    )[:extra]
    wanted = [floor] * n
    for _, place in rest:
        wanted[order[place]] += 1
    assert pooled_counts(scores, total, order, floor).tolist() == wanted
    if n * floor < total < n * m:
        assert pooled(scores, total, order, floor).tolist() == wanted
    assert sum(wanted) == min(total, n * m)


def test_nan_scores_never_change_how_many_are_kept():
    scores = torch.tensor([[float("nan"), 1.0, float("nan"), 0.0], [float("nan")] * 4])
    kept = pick(scores, torch.tensor([3, 3]), 5)
    assert kept.indices.tolist() == [[1, 3, 4], [0, 1, 4]]
    assert pooled_counts(scores, 5, [0, 1]).tolist() == [4, 1]
    assert picked(scores, torch.tensor([3, 3]), 5, 3).tolist() == [[1, 3, 4], [0, 1, 4]]
    assert pooled(scores, 5, [0, 1]).tolist() == [4, 1]


@pytest.mark.parametrize("scores", [torch.ones(4, 50_000), torch.arange(200_000.0).view(4, -1)])
def test_selection_of_long_prompts_with_equal_or_sorted_scores(scores):
    """The worst inputs of a quick select end, and give the first ones."""
    counts = torch.tensor([3, 40_000, 50_000, 0])
    kept = pick(scores, counts, 50_000)
    assert torch.equal(kept.indices, picked(scores, counts, 50_000, 50_000))
    order = [2, 0, 1, 3]
    assert torch.equal(pooled_counts(scores, 60_000, order), pooled(scores, 60_000, order))


def test_top_mask_of_nothing():
    scores = torch.zeros(2, 3)
    assert not top_mask(scores, torch.tensor([0, 0]), 0).any()
    assert top_mask(scores, torch.tensor([0, 2]), 2).tolist() == [[False] * 3, [True, True, False]]


shares = st.lists(st.floats(1e-3, 10.0), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(share=shares, low=st.integers(0, 40), room=st.integers(1, 300), fill=st.floats(0.0, 1.0))
def test_water_fill_rounds_the_exact_level(share, low, room, fill):
    high, n = low + room, len(share)
    total = round(n * (low + fill * room))
    values = water_fill(share, total, low, high)
    exact = water_level(share, total, low, high)
    assert values.sum() == total
    assert values.min() >= low and values.max() <= high
    assert np.abs(values - exact).max() < 1 + 1e-6


@settings(max_examples=200, deadline=None)
@given(
    share=st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.5, 1e9]), min_size=1, max_size=12),
    low=st.integers(0, 40),
    room=st.integers(0, 300),
    fill=st.floats(-0.2, 1.2),
)
def test_water_fill_keeps_the_total_with_zero_shares(share, low, room, fill):
    high, n = low + room, len(share)
    wanted = round(n * (low + fill * room))
    values = water_fill(share, wanted, low, high)
    assert values.sum() == min(max(wanted, n * low), n * high)
    assert values.min() >= low and values.max() <= high


def test_water_fill_by_hand():
    assert water_fill([1, 1, 2], 400, 10, 1000).tolist() == [100, 100, 200]
    # The third is cut at 120; what it loses goes to the others.
    assert water_fill([1, 1, 2], 300, 10, 120).tolist() == [90, 90, 120]
    # The first is raised to its floor at the cost of the others.
    assert water_fill([0, 1, 3], 100, 20, 1000).tolist() == [20, 20, 60]
    # Nobody wants what is left: heads of share zero rise together.
    assert water_fill([0, 0, 1], 100, 10, 60).tolist() == [20, 20, 60]
    assert water_fill([0, 0, 0], 11, 0, 60).tolist() == [4, 4, 3]
    # Largest remainder first, then the lower head.
    assert water_fill([1, 1, 1], 100, 0, 100).tolist() == [34, 33, 33]
    assert water_fill([3, 2, 3], 31, 0, 100).tolist() == [12, 8, 11]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_water_fill_does_not_depend_on_the_scale_of_shares(scale):
    share = np.array([1.0, 5.0, 2.0, 9.0, 0.0])
    assert water_fill(share * scale, 777, 20, 400).tolist() == (
        water_fill(share, 777, 20, 400).tolist()
    )


@pytest.mark.parametrize("count", [1, 9])
def test_a_count_that_cannot_be_is_refused_before_compiled_code_sees_it(count: int) -> None:
    """Fewer than the window, or more than the prompt has."""
    scores = torch.zeros(2, 6)
    with pytest.raises(ValueError, match=f"keeps 2 to 8 tokens here, not {count}"):
        pick(scores, torch.tensor([4, count]), 8, 8)

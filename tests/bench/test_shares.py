# SPDX-License-Identifier: Apache-2.0
"""Profiles on models of another shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairkv_sglang.bench.shares import find_profile, map_profile, picked, synthetic_profile
from fairkv_sglang.profiles import HeadProfile


def contiguous_imbalance(shares: np.ndarray, ranks: int) -> float:
    loads = shares.reshape(len(shares), ranks, -1).sum(axis=2)
    return float(loads.max(axis=1).sum() / loads.mean(axis=1).sum())


@given(st.integers(1, 60), st.integers(1, 60))
def test_picked_indices_are_in_range_in_order_and_even(count: int, available: int) -> None:
    indices = picked(count, available)
    assert len(indices) == count
    assert indices.min() >= 0 and indices.max() < available
    assert (np.diff(indices) >= 0).all()
    times = np.bincount(indices, minlength=available)
    assert times.max() - times.min() <= 1


def test_the_same_shape_changes_nothing() -> None:
    profile = synthetic_profile(6, 8)
    assert map_profile(profile, 6, 8).shares == pytest.approx(profile.shares)


def test_a_smaller_model_gets_evenly_spaced_layers_and_heads() -> None:
    table = np.arange(1.0, 1.0 + 8 * 4).reshape(8, 4)
    mapped = map_profile(HeadProfile("m", table), 4, 2)
    want = table[[1, 3, 5, 7]][:, [1, 3]]
    assert mapped.shares == pytest.approx(want / want.sum())
    assert mapped.model == "m"
    assert mapped.meta["mapped_from"] == [8, 4]


def test_a_larger_model_repeats_them_and_keeps_the_imbalance() -> None:
    profile = synthetic_profile(5, 4, seed=3)
    mapped = map_profile(profile, 10, 8)
    before = contiguous_imbalance(profile.shares, 2)
    assert contiguous_imbalance(mapped.shares, 2) == pytest.approx(before)


def test_the_synthetic_profile_is_as_skewed_as_measured_ones() -> None:
    found = [contiguous_imbalance(synthetic_profile(32, 8, seed).shares, 2) for seed in range(5)]
    assert min(found) > 1.2 and max(found) < 1.7


def test_a_file_is_read_and_mapped(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    synthetic_profile(8, 8).save(file)
    assert find_profile(file, 4, 8).shares.shape == (4, 8)
    assert find_profile(None, 3, 2).meta["source"] == "synthetic"
    with pytest.raises(ValueError, match="no such file"):
        find_profile(tmp_path / "missing.json", 4, 8)

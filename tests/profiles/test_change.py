# SPDX-License-Identifier: Apache-2.0
"""Changes of traffic are found where they are, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.profiles.change import NEWEST, since_change

LAYERS, HEADS = 4, 8


def task(rng: np.random.Generator, count: int, shares: np.ndarray, spread: float) -> np.ndarray:
    """Requests of one kind, of different lengths; a head's share varies by ``spread``."""
    noise = rng.lognormal(0.0, spread, (count, LAYERS, HEADS))
    length = rng.integers(100, 4000, (count, 1, 1))
    return np.rint(length * shares * noise)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), old=st.integers(8, 56), new=st.integers(0, 40))
def test_the_newest_kind_is_what_is_left(seed: int, old: int, new: int) -> None:
    rng = np.random.default_rng(seed)
    first = rng.lognormal(0.0, 0.9, (LAYERS, HEADS))
    requests = np.concatenate([task(rng, old, first, 0.25), task(rng, new, first[:, ::-1], 0.25)])
    left = since_change(requests)
    if new >= NEWEST:
        assert abs(len(left) - new) <= 1
    else:  # too few to be a kind of their own; the cut nearest to them may still be worth it
        assert len(left) >= NEWEST
    assert (left == requests[len(requests) - len(left) :]).all()


def test_one_kind_is_hardly_ever_cut() -> None:
    rng = np.random.default_rng(0)
    shares = rng.lognormal(0.0, 0.9, (LAYERS, HEADS))
    cut = sum(len(since_change(task(rng, 64, shares, 0.3))) < 64 for _ in range(100))
    assert cut <= 2


@pytest.mark.parametrize("count", [0, 1, 5, 12, 64])
def test_equal_requests_and_empty_layers(count: int) -> None:
    same = np.full((count, LAYERS, HEADS), 100.0)
    assert len(since_change(same)) == count
    same[:, 0] = 0
    assert len(since_change(same)) == count


def test_only_the_last_of_several_changes_counts() -> None:
    rng = np.random.default_rng(3)
    kinds = [rng.lognormal(0.0, 0.9, (LAYERS, HEADS)) for _ in range(3)]
    parts = [task(rng, 20, kind, 0.2) for kind in kinds]
    assert len(since_change(np.concatenate(parts))) == 20

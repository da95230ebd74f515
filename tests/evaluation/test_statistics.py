# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests against scipy, distances against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, entropy

from fairkv_sglang.evaluation.statistics import (
    agreement,
    divergence,
    same_tokens,
    sign_test,
    wilson,
)


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_is_scipys(count: int, share: float) -> None:
    right = round(count * share)
    expected = binomtest(right, count).proportion_ci(0.95, "wilson")
    assert wilson(right, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_no_samples_say_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(0, 60), st.integers(0, 60))
def test_sign_test_is_scipys(lost: int, won: int) -> None:
    expected = binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert sign_test(lost, won) == pytest.approx(expected)


def test_agreement() -> None:
    assert same_tokens("abc", "abd") == 2 and same_tokens("ab", "abc") == 2
    assert agreement("abc", "abd") == pytest.approx(2 / 3)
    assert agreement("ab", "abcd") == 0.5
    assert agreement("", "") == 1.0 and agreement("", "a") == 0.0


probabilities = st.lists(st.floats(0.01, 1), min_size=6, max_size=6).map(
    lambda x: np.array(x) / sum(x)
)


@given(probabilities, probabilities, st.integers(1, 6), st.integers(1, 6))
def test_divergence_is_a_lower_bound(p: np.ndarray, q: np.ndarray, of_p: int, of_q: int) -> None:
    def top(x: np.ndarray, count: int) -> dict[str, float]:
        return {f"t{i}": math.log(x[i]) for i in np.argsort(-x)[:count]}

    exact = float(entropy(p, q))
    assert 0 <= divergence(top(p, of_p), top(q, of_q)) <= exact + 1e-4
    assert divergence(top(p, 6), top(q, 6)) == pytest.approx(exact, abs=1e-4)
    assert divergence(top(p, of_p), top(p, of_p)) == pytest.approx(0, abs=1e-6)


def test_divergence_of_lists_without_a_common_token() -> None:
    sure, other = {"a": math.log(0.8)}, {"b": math.log(0.9)}
    assert divergence(sure, other) > 1.0
    assert divergence({"a": 0.0}, {"b": 0.0}) < 20  # finite, though nothing is left for the other
    assert divergence({}, {}) == 0.0

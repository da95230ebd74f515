# SPDX-License-Identifier: Apache-2.0
"""Predictions of the heads' loads: shapes, known answers, and that each sees what it should."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fairkv_sglang.profiles.predict import (
    PREDICTORS,
    exponential_mean,
    misplaced,
    share_series,
    window_mean,
)

WINDOW = 16


def _history(count: int = 96, noise: float = 0.1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base = rng.lognormal(4.0, 0.8, (2, 3))
    lengths = rng.lognormal(0.0, 0.3, (count, 1, 1))
    return np.asarray(base * lengths * rng.lognormal(0.0, noise, (count, 2, 3)))


@pytest.fixture(params=list(PREDICTORS))
def name(request: pytest.FixtureRequest) -> str:
    """Every predictor that can run here."""
    if request.param == "arima":
        pytest.importorskip("statsmodels", reason="an optional package")
    return str(request.param)


def test_steady_traffic_is_predicted_and_the_same_twice(name: str) -> None:
    history = _history()
    first, second = (PREDICTORS[name](history, WINDOW) for _ in range(2))
    assert first.shape == (2, 3) and first.dtype == np.float64
    assert np.isfinite(first).all() and (first >= 0).all()
    assert (first == second).all()
    assert misplaced(first, history.mean(axis=0)) < 0.06
    np.testing.assert_allclose(first.sum(1), history[-WINDOW:].mean(0).sum(1), rtol=0.2)


def test_constant_traffic_is_predicted_exactly(name: str) -> None:
    history = np.repeat(_history(1), 64, axis=0)
    np.testing.assert_allclose(PREDICTORS[name](history, WINDOW), history[0], rtol=1e-3)


def test_heads_that_keep_nothing_stay_empty(name: str) -> None:
    history = _history()
    history[:, :, 0] = 0.0
    found = PREDICTORS[name](history, WINDOW)
    assert (found[:, 0] <= 1e-6 * found.sum(axis=1)).all()


def test_lstm_leaves_the_random_state_alone() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    PREDICTORS["lstm"](_history(), WINDOW)
    assert (torch.rand(4) == expected).all()


def test_what_each_mean_looks_at() -> None:
    history = np.zeros((40, 1, 2))
    history[-WINDOW:, 0] = [1.0, 3.0]
    np.testing.assert_allclose(window_mean(history, WINDOW), [[1.0, 3.0]])
    history[0] = 1e9  # before the window
    np.testing.assert_allclose(window_mean(history, WINDOW), [[1.0, 3.0]])
    ages = np.arange(2000.0)[::-1].reshape(-1, 1, 1)
    # the same mean age as the window's
    assert exponential_mean(ages, WINDOW)[0, 0] == pytest.approx((WINDOW - 1) / 2, rel=1e-6)


def test_share_series() -> None:
    history = np.array([[[1.0, 3.0]], [[3.0, 1.0]], [[2.0, 2.0]], [[6.0, 2.0]], [[0.0, 4.0]]])
    series = share_series(history, 16)  # two prompts a point, the latest four
    np.testing.assert_allclose(series, [[5 / 8, 3 / 8], [6 / 12, 6 / 12]])
    with pytest.raises(ValueError, match="too few"):
        share_series(history[:3], 16)


def test_misplaced() -> None:
    table = np.array([[1.0, 3.0], [2.0, 2.0]])
    assert misplaced(table, 7.0 * table) == pytest.approx(0.0, abs=1e-12)
    assert misplaced(np.array([[1.0, 0.0]]), np.array([[0.0, 5.0]])) == 1.0
    assert misplaced(table, table[:, ::-1]) == pytest.approx(0.25)


def test_arima_without_statsmodels_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("statsmodels", "statsmodels.tsa.arima.model"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match="pip install statsmodels"):
        PREDICTORS["arima"](_history(), WINDOW)

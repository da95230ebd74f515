# SPDX-License-Identifier: Apache-2.0
"""What the heads will keep of the next prompts, predicted from the last ones.

One interface, four methods: those that Cong et al., "Prediction Is All MoE Needs: Expert Load
Fluctuates Initially and Then Stabilizes" (arXiv 2404.16914), compare for the loads of experts
(sliding mean, ARIMA, LSTM), and the exponential mean. The server plans from the sliding mean;
docs/prediction.md has the comparison and ``fairkv predict`` makes it.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from fairkv_sglang.profiles.head_profile import FloatArray

# history [N, L, H] of kept tokens, oldest first, and the window W: mean kept tokens [L, H] that is
# expected of the next W prompts. Same arguments, same outcome.
Predictor = Callable[[FloatArray, int], FloatArray]

# A window is this many points of a series: single prompts are too noisy to fit a model to.
_POINTS = 8
_ORDER = (1, 1, 1)
_UNITS = 16
_LOOK_BACK = 8
_EPOCHS = 120


def window_mean(history: FloatArray, window: int) -> FloatArray:
    """Mean of the last ``window`` prompts."""
    mean: FloatArray = history[-window:].mean(axis=0)
    return mean


def exponential_mean(history: FloatArray, window: int) -> FloatArray:
    """Exponential mean with the factor 2 / (window + 1), whose weights are on average as old as the
    window's."""
    age = np.arange(len(history))[::-1]
    weights = (1.0 - 2.0 / (window + 1)) ** age
    return np.asarray(np.tensordot(weights / weights.sum(), history, axes=1), dtype=np.float64)


def arima(history: FloatArray, window: int) -> FloatArray:
    """ARIMA(1, 1, 1) of each head's share of its layer.

    Raises:
        ValueError: statsmodels is not installed.
    """
    try:
        model = importlib.import_module("statsmodels.tsa.arima.model").ARIMA
    except ModuleNotFoundError:
        raise ValueError("arima needs statsmodels: pip install statsmodels") from None
    series = share_series(history, window)
    out = np.empty(series.shape[1])
    for head in range(series.shape[1]):
        out[head] = _forecast(model, series[:, head])
    return _tokens(out, history, window)


def lstm(history: FloatArray, window: int) -> FloatArray:
    """A small LSTM, one for all heads, that learns from the history alone.

    It sees how a head's share stood to its present mean at the last points and predicts the mean of
    a window from there.
    """
    import torch

    series = share_series(history, window)
    points = len(series)
    level = np.maximum(series[-_POINTS:].mean(axis=0), 1e-9)
    relative = torch.tensor(series / level - 1.0, dtype=torch.float32).T  # [heads, points]
    starts = range(max(points - _LOOK_BACK - _POINTS + 1, 0))
    if not starts:
        return window_mean(history, window)
    seen = torch.cat([relative[:, s : s + _LOOK_BACK] for s in starts])
    ahead = torch.cat(
        [relative[:, s + _LOOK_BACK : s + _LOOK_BACK + _POINTS].mean(dim=1) for s in starts]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = torch.nn.LSTM(1, _UNITS, batch_first=True)
        head = torch.nn.Linear(_UNITS, 1)

    def ask(inputs: torch.Tensor) -> torch.Tensor:
        # from where the series stands, so that a constant needs no learning
        states, _ = layer(inputs[:, :, None])
        answer: torch.Tensor = inputs.mean(dim=1) + head(states[:, -1])[:, 0]
        return answer

    optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.01)
    for _ in range(_EPOCHS):
        optimiser.zero_grad()
        loss = torch.nn.functional.smooth_l1_loss(ask(seen), ahead)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        expected = ask(relative[:, -_LOOK_BACK:]).numpy().astype(np.float64)
    return _tokens((1.0 + expected) * level, history, window)


PREDICTORS: dict[str, Predictor] = {
    "mean": window_mean,
    "exponential": exponential_mean,
    "arima": arima,
    "lstm": lstm,
}


def share_series(history: FloatArray, window: int) -> FloatArray:
    """Float64 [T, L * H]: each head's share of its layer, one point per ``window / 8`` prompts.

    Raises:
        ValueError: not even two points.
    """
    size = max(window // _POINTS, 1)
    points = len(history) // size
    if points < 2:
        raise ValueError(f"{len(history)} prompts are too few to predict from; needed {2 * size}")
    blocks = history[-points * size :].reshape(points, size, *history.shape[1:]).sum(axis=1)
    return _shares(blocks).reshape(points, -1)


def misplaced(expected: FloatArray, found: FloatArray) -> float:
    """Part of the load that is at another head than expected, within layers; 0 to 1.

    Half the sum of the absolute differences of the shares of a layer, mean over the layers.
    """
    return float(np.abs(_shares(expected) - _shares(found)).sum(axis=-1).mean() / 2)


def _shares(kept: FloatArray) -> FloatArray:
    """``[..., H]`` scaled to a sum of 1 in each layer; equal shares where nothing is kept."""
    total = kept.sum(axis=-1, keepdims=True)
    shares: FloatArray = np.full_like(kept, 1.0 / kept.shape[-1])
    np.divide(kept, total, out=shares, where=total > 0)
    return shares


def _tokens(shares: FloatArray, history: FloatArray, window: int) -> FloatArray:
    """Shares ``[L * H]`` of layers as tokens ``[L, H]``, layers as large as in the last window."""
    mean = window_mean(history, window)
    table = np.maximum(np.nan_to_num(shares), 0.0).reshape(mean.shape)
    tokens: FloatArray = _shares(table) * mean.sum(axis=1, keepdims=True)
    return tokens


def _forecast(model: Any, series: FloatArray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a start that does not converge at once, short series
        try:
            fitted = model(series, order=_ORDER).fit()
            return float(fitted.forecast(_POINTS).mean())
        except np.linalg.LinAlgError:
            return float(series[-_POINTS:].mean())

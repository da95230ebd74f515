# SPDX-License-Identifier: Apache-2.0
"""Scores of what a head holds while its request writes, against the formula, one row at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.budgets import make_scorer
from fairkv_sglang.budgets.outputs import key_difference, score_held
from fairkv_tests.core_cases import QUICK, seeds

REACH, SIMILAR = 3, 0.5


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    terms = [math.exp(value - top) for value in values]
    return [term / sum(terms) for term in terms]


def reference(q: np.ndarray, k: np.ndarray, scale: float, redundancy: float) -> list[float]:
    """``q [W, g, D]``, oldest first, and ``k [M, D]`` of one head, in double precision."""
    window, group, _ = q.shape
    rows = len(k)
    importance = np.zeros(rows)
    for j in range(group):
        mean = np.zeros(rows)
        for i in range(window):
            end = rows - window + 1 + i  # the rows that there were when this query was made
            mean[:end] += softmax([float(q[i, j] @ k[t]) * scale for t in range(end)])
        mean /= window
        mean[rows - window :] = 0
        for t in range(rows):
            importance[t] += mean[max(t - REACH, 0) : t + REACH + 1].max() / group
    if not redundancy:
        return importance.tolist()
    unit = k / np.linalg.norm(k, axis=1, keepdims=True)
    cosine = unit @ unit.T
    for i in range(rows):
        cosine[i, i] = 0
    for i in range(rows):
        alike = [t for t in range(rows) if cosine[i, t] > SIMILAR]
        if alike:
            cosine[i, alike[-1]] = 0
    repeated = np.array(softmax(cosine.mean(axis=0).tolist()))
    return ((1 - redundancy) * importance - redundancy * repeated).tolist()


def heads(seed: int, held: list[int], window: int, group: int = 2, dim: int = 8):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(len(held), window, group, dim))
    k = rng.normal(size=(len(held), max(held), dim))
    k[:, 1::5] = k[:, :1] + rng.normal(scale=0.1, size=k[:, 1::5].shape)  # some alike
    return q, k


@settings(QUICK, max_examples=30)
@given(
    seed=seeds,
    held=st.lists(st.integers(5, 40), min_size=1, max_size=4),
    window=st.integers(1, 5),
    redundancy=st.sampled_from([0.0, 0.9, 1.0]),
)
def test_scores_are_those_of_the_formula(
    seed: int, held: list[int], window: int, redundancy: float
) -> None:
    """Whatever stands behind the rows of a head, NaN included."""
    q, k = heads(seed, held, window)
    for e, rows in enumerate(held):
        k[e, rows:] = np.nan
    found = score_held(
        torch.tensor(q, dtype=torch.float32),
        torch.tensor(k, dtype=torch.float32),
        torch.tensor(held),
        0.5,
        redundancy,
    )
    for e, rows in enumerate(held):
        want = reference(q[e], k[e, :rows], 0.5, redundancy)
        assert found[e, :rows].tolist() == pytest.approx(want, abs=1e-5)
        assert (found[e, rows:] == -torch.inf).all()


def test_keydiff_is_the_scorer_of_that_name() -> None:
    """Over the rows of each head alone."""
    window, held = 3, [30, 17, 24]
    _, keys = heads(6, held, window)
    k = torch.tensor(keys, dtype=torch.float32)
    found = key_difference(k, torch.tensor(held))
    scorer = make_scorer("keydiff", window=window)
    for e, rows in enumerate(held):
        want = scorer.score(None, k[e, :rows, None], scale=1.0)[0]
        torch.testing.assert_close(found[e, : rows - window], want)
        assert (found[e, rows:] == -torch.inf).all()


def test_of_repeated_tokens_the_last_is_the_least_redundant() -> None:
    """R-KV's point: three keys that are the same, so attention cannot tell one from another."""
    _, k = heads(3, [24], 4)
    for place in (4, 9, 15):
        k[0, place] = k[0, 4]
    k[0, 1::5] += 3 * np.eye(8)[:5]  # these are not alike
    none = torch.zeros((1, 4, 1, 8))
    scores = score_held(none, torch.tensor(k), torch.tensor([24]), 1.0, 1.0)[0]
    first, second, third = scores[[4, 9, 15]].tolist()
    assert first < second < third

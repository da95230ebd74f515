# SPDX-License-Identifier: Apache-2.0
"""Scores against the papers' formulae, and what tensor parallelism needs of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.budgets import SCORERS, make_scorer
from fairkv_tests.budgets_reference import snapkv_scores


def _random_qk(seed, rows, total, heads, group, width, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, heads, group, width, generator=source).to(dtype)
    k = torch.randn(total, heads, width, generator=source).to(dtype)
    return q, k


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    total=st.integers(1, 40),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    window=st.integers(1, 9),
    kernel=st.sampled_from([1, 3, 5, 7]),
    pooling=st.sampled_from(["max", "avg"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_snapkv_equals_the_formula(seed, total, heads, group, window, kernel, pooling, dtype):
    q, k = _random_qk(seed, min(window, total), total, heads, group, 8, dtype)
    scale = 8**-0.5
    scorer = make_scorer("snapkv", window=window, kernel_size=kernel, pooling=pooling)
    scores = scorer.score(q, k, scale=scale)
    wanted = snapkv_scores(
        q.float().numpy(),
        k.float().numpy(),
        window=window,
        kernel=kernel,
        pooling=pooling,
        scale=scale,
    )
    assert scores.dtype == torch.float32
    assert scores.shape == wanted.shape == (heads, max(total - window, 0))
    np.testing.assert_allclose(scores.numpy(), wanted, rtol=2e-5, atol=1e-7)


def test_snapkv_reads_only_the_last_window_of_queries():
    q, k = _random_qk(1, 20, 50, 2, 2, 8)
    scorer = make_scorer("snapkv", window=6)
    assert torch.equal(scorer.score(q, k, scale=0.3), scorer.score(q[-6:], k, scale=0.3))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    total=st.integers(33, 700),
    heads=st.integers(2, 8),
    group=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_snapkv_scores_a_head_the_same_in_any_company(seed, total, heads, group, dtype):
    """TP 1 scores all heads in one call, TP 4 a part of them in another order: same bits."""
    q, k = _random_qk(seed, 32, total, heads, group, 32, dtype)
    scorer = make_scorer("snapkv")
    together = scorer.score(q, k, scale=0.2)
    order = np.random.default_rng(seed).permutation(heads).tolist()
    permuted = scorer.score(q[:, order], k[:, order], scale=0.2)
    assert torch.equal(permuted, together[order])
    for head in range(heads):
        part = slice(head, head + 1)
        alone = scorer.score(q[:, part].contiguous(), k[:, part].contiguous(), scale=0.2)
        assert torch.equal(alone[0], together[head])


def test_snapkv_group_is_reduced_before_top_k():
    """Two query heads look at two tokens each; the mean prefers the token that both look at."""
    k = torch.zeros(12, 1, 3)
    k[2, 0, 0] = k[5, 0, 1] = k[7, 0, 2] = 1.0
    q = torch.zeros(1, 1, 2, 3)
    q[0, 0, 0] = torch.tensor([6.0, 5.7, 0.0])  # best token 2, then 5
    q[0, 0, 1] = torch.tensor([0.0, 5.7, 6.0])  # best token 7, then 5
    scores = make_scorer("snapkv", window=1, kernel_size=1).score(q, k, scale=1.0)
    assert scores.shape == (1, 11)
    assert int(scores[0].argmax()) == 5


def test_snapkv_is_causal_inside_the_window():
    """Keys after a query do not change what the query gives to earlier tokens."""
    q, k = _random_qk(4, 4, 20, 1, 1, 8)
    q[1:] = 0.0  # these rows attend evenly whatever the keys are
    changed = k.clone()
    changed[17:] = 50.0
    scorer = make_scorer("snapkv", window=4, kernel_size=1)
    first, second = (scorer.score(q, keys, scale=0.3) for keys in (k, changed))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


@pytest.mark.parametrize("total", [1, 5, 36, 37, 100])
def test_streaming_prefers_sinks_then_recent_tokens(total):
    scorer = make_scorer("streaming", sink=4, window=32)
    scores = scorer.score(None, torch.zeros(total, 3, 8), scale=1.0)
    scored = max(total - 32, 0)
    assert scores.shape == (3, scored)
    order = torch.argsort(scores, dim=1, descending=True).tolist()
    sinks = list(range(min(4, scored)))
    assert order == [sinks + list(range(scored - 1, len(sinks) - 1, -1))] * 3


def test_streaming_is_exact_for_long_prompts():
    scores = make_scorer("streaming").score(None, torch.zeros(140_000, 1, 1), scale=1.0)
    assert scores.unique().numel() == scores.numel()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snap", {}, "unknown scorer 'snap'; known: snapkv, streaming"),
        ("snapkv", {"kernal": 5}, "no option kernal; it has: window, kernel_size, pooling"),
        ("snapkv", {"kernel_size": 4}, "4 is even"),
        ("snapkv", {"window": 0}, "window: 0 must be greater than 0"),
        ("snapkv", {"pooling": "median"}, "pooling: 'median' is not one of max, avg"),
        ("streaming", {"sink": -1}, "sink: -1 must be at least 0"),
    ],
)
def test_bad_scorer_is_one_clear_line(name, options, message):
    with pytest.raises(ValueError) as error:
        make_scorer(name, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_snapkv_refuses_queries_that_do_not_fit():
    q, k = _random_qk(0, 4, 40, 2, 2, 8)
    scorer = make_scorer("snapkv")
    with pytest.raises(ValueError, match="needs the queries"):
        scorer.score(None, k, scale=1.0)
    with pytest.raises(ValueError, match="do not fit keys"):
        scorer.score(q[:, :1], k, scale=1.0)
    with pytest.raises(ValueError, match="needs 32 queries, not 4"):
        scorer.score(q, k, scale=1.0)


def test_every_scorer_fills_its_contract():
    for name in SCORERS:
        scorer = make_scorer(name)
        assert scorer.name == name
        q, k = _random_qk(5, scorer.window, 90, 3, 2, 8)
        scores = scorer.score(q if scorer.needs_queries else None, k, scale=0.3)
        assert scores.shape == (3, 90 - scorer.window)
        assert scores.dtype == torch.float32 and bool(scores.isfinite().all())
        first = sorted(scores[0].topk(max(scorer.sink, 1)).indices.tolist())
        assert scorer.sink == 0 or first == list(range(scorer.sink))

# SPDX-License-Identifier: Apache-2.0
"""Scores against the papers' formulae, and what tensor parallelism needs of them."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fairkv_sglang.budgets import (
    SCORERS,
    BudgetSpec,
    PromptTensors,
    Rope,
    make_scope,
    make_scorer,
    pick,
)
from fairkv_sglang.budgets.repeats import PassPart, Wording
from fairkv_sglang.model import Model
from fairkv_tests import scorer_references as references
from fairkv_tests.budgets_reference import snapkv_scores
from fairkv_tests.learned import write_weights
from fairkv_tests.scorer_references import rope


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
        ("snap", {}, "unknown scorer 'snap'; known: compactor, expected_attention, fastkvzip, h2o"),
        ("snapkv", {"kernal": 5}, "no option kernal; it has: window, kernel_size, pooling, group"),
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


@cache
def folder():
    """Of checkpoints, to the end of the process."""
    return tempfile.TemporaryDirectory()


@cache
def weights(name, heads, dim, number):
    """A model and its checkpoint."""
    model = Model("random", 2, heads * 2, heads, dim, 24)
    return model, write_weights(Path(folder().name) / f"{heads}-{number}", name, model, number)


class Asked:
    """Random tensors of a prompt, and what the package and the formula make of them."""

    def __init__(self, number, name, total, *, heads=3, dtype=torch.float32, **options):
        source, dim = torch.Generator().manual_seed(number), 8
        self.q = torch.randn(total, heads, 2, dim, generator=source).to(dtype) * 2
        self.k, self.v = torch.randn(2, total, heads, dim, generator=source).to(dtype)
        self.scorer, self.options = make_scorer(name, **options), options
        self.rope = rope(total + 9, dim)
        self.passes = []
        self.hidden = None
        if self.scorer.reads_hidden:
            self.hidden = torch.randn(total, 24, generator=source).to(dtype)
            self.model, checkpoint = weights(name, heads, dim, number % 4)
            self.options["scorer_checkpoint"] = checkpoint
            self.scorer = make_scorer(name, **self.options)
        if self.scorer.repeats:
            plain = Wording((), (), ())
            for start, end in plain.chunks(range(total), self.scorer.chunk):
                behind = 5 + end - start
                q = torch.randn(behind, heads, 2, dim, generator=source).to(dtype) * 2
                own = torch.randn(behind, heads, dim, generator=source).to(dtype)
                self.passes.append((start, end, q, own))

    def scores(self, heads=slice(None), layer=1):
        """Of some heads, told in one call; queries come in two pieces."""
        number = range(self.k.shape[1])[heads]
        q, k, v = self.q[:, heads], self.k[:, heads], self.v[:, heads]
        prompt = PromptTensors(q[-self.scorer.window :], k, 0.3, v, layer, number, self.rope)
        if self.scorer.observes:
            seen, half = None, len(k) // 2
            for part in (slice(0, half), slice(half, None)):
                seen = self.scorer.observe(
                    seen, replace(prompt, q=q[part], k=k[: part.stop], v=None)
                )
            prompt = replace(prompt, seen=seen)
        if self.passes:
            prompt = replace(prompt, seen=self.repeated(heads))
        if self.hidden is not None:
            where = torch.float32, torch.device("cpu")
            gate = self.scorer.gates(self.model, [layer], number, *where)[layer]
            prompt = replace(prompt, seen=gate(self.hidden.float()).T)
        found = self.scorer.score_prompt(prompt)
        assert found.shape == (len(number), max(len(k) - self.scorer.window, 0))
        assert found.dtype == torch.float32
        return found

    def repeated(self, heads):
        """float32 [heads, N] of all passes, each in three pieces."""
        found = []
        for start, end, q, own in self.passes:
            seen, sinks = None, min(self.scorer.sink, start)
            for a, b in itertools.pairwise((0, 2, 1 + len(q) // 2, len(q))):
                k = torch.cat([self.k[:sinks], self.k[start:end], own[:b]])
                part = PassPart(q[a:b, heads], k[:, heads], sinks, end - start, 0.3, b == len(q))
                seen = self.scorer.attend(seen, part)
            found.append(seen.most)
        return torch.cat(found, dim=1)

    def wanted(self):
        """By the formula, of all heads."""
        scorer = self.scorer
        return references.scores(
            scorer.name, self.q.float(), self.k.float(), self.v.float(), scale=0.3, layer=1,
            passes=[(a, b, q.float(), k.float()) for a, b, q, k in self.passes],
            last=len(self.k) + 9, hidden=None if self.hidden is None else self.hidden.float(),
            **{"window": scorer.window, **self.options},
        )  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(SCORERS)),
    total=st.integers(1, 60),
    window=st.integers(1, 9),
    sink=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    group=st.sampled_from(["mean", "max"]),
    accumulation=st.sampled_from(["sum", "mean"]),
)
def test_every_scorer_equals_its_formula(
    seed, name, total, window, sink, dtype, group, accumulation
):
    values = {
        "sink": sink, "lag": 5, "sketch": 4, "attention_block": 7, "future": 12, "group": group,
        "accumulation": accumulation, "seed": seed, "chunk": 13,
    }  # fmt: skip
    # All of no more tokens than the sketch has columns have a leverage of 1: what compactor's
    # normalisation makes of their differences is rounding.
    assume(name != "compactor" or total - window - sink > values["sketch"])
    options = {key: value for key, value in values.items() if key in SCORERS.options(name)}
    asked = Asked(seed, name, total, dtype=dtype, window=window, **options)
    scores, wanted = asked.scores(), asked.wanted()
    if asked.scorer.spans_heads:
        scores = asked.scorer.combine(scores)
    np.testing.assert_allclose(scores.numpy(), wanted.reshape(scores.shape), rtol=3e-4, atol=2e-6)


@pytest.mark.parametrize("name", list(SCORERS))
def test_every_scorer_fills_its_contract(name):
    asked = Asked(5, name, 700, heads=4)
    scorer = asked.scorer
    scores = asked.scores()
    assert scorer.name == name and bool(scores.isfinite().all())
    for row in scores if scorer.sink else ():
        assert sorted(row.topk(scorer.sink).indices.tolist()) == list(range(scorer.sink))
    # A head's bits do not depend on the others in the call.
    for heads in (slice(0, 2), slice(2, 4), slice(3, None), slice(None, None, 3)):
        assert torch.equal(asked.scores(heads), scores[heads])


@pytest.mark.parametrize("name", [name for name in SCORERS if "sink" in SCORERS.options(name)])
def test_sinks_are_kept_where_heads_compete(name):
    """Also by a head that has much lower scores than another, with no room for anything else."""
    asked = Asked(6, name, 300)
    asked.v[:, 0] *= 1e4
    scorer, scores = asked.scorer, asked.scores()
    spec = BudgetSpec(tokens=scorer.least_budget)
    scope = make_scope("layer", spec, 1, 3, scorer, floor_alpha=0.0)
    kept = pick(scores, scope.counts(0, range(3), scores, 300), 300)
    assert kept.indices.tolist() == [[*range(scorer.sink), *range(268, 300)]] * 3


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "streaming"])
def test_equal_keys_and_short_prompts_have_scores(name):
    """All-equal keys, values and queries; a prompt as long as the window, and one token more."""
    for total in (1, 32, 33, 90):
        asked = Asked(0, name, total)
        for x in (asked.q, asked.k, asked.v):
            x[:] = x[0]
        scores = asked.scores()
        kept = torch.full((3,), min(total, asked.scorer.window + 1))
        assert pick(scores, kept, total).counts.sum() > 0
        asked.k[:] = asked.v[:] = 0
        asked.scores()


def test_expected_attention_holds_no_keys_for_each_query_head():
    """At 131,072 tokens a copy of the keys for each of eight query heads is half a GiB."""
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in [result] if isinstance(x, torch.Tensor))
            return result

    total, group, width, window = 1000, 4, 8, 32
    q, k = _random_qk(0, total, total, 1, group, width)
    scorer = make_scorer("expected_attention", window=window)
    part = PromptTensors(q, k, 1.0, v=k, rope=rope(total, width))
    seen = scorer.observe(None, part)
    with Sizes():
        scorer.score_prompt(replace(part, q=None, seen=seen))
    assert max(largest) <= total * width


def test_lagkv_ranks_by_the_other_channels_where_one_is_constant():
    """As large biases are in bfloat16: one such channel must not make a partition NaN."""
    k, v = torch.randn(2, 40, 1, 6, generator=torch.Generator().manual_seed(0))
    k[..., 0] = 3.0
    scorer = make_scorer("lagkv", window=4, sink=0, lag=8)
    scores = scorer.score_prompt(PromptTensors(None, k, 1.0, v=v))[0, :32].view(4, 8)
    for first, part in zip(range(0, 32, 8), scores, strict=True):
        parts = []
        for x in (k[:, 0, 1:], v[:, 0]):
            following = x[first + 8 : first + 16]
            least, largest = following.amin(dim=0), following.amax(dim=0)
            apart = (x[first : first + 8] - least) / (largest - least)
            apart = torch.nn.functional.pad(apart, (6 - apart.shape[1], 0))
            parts.append(apart.std(dim=1).softmax(dim=0))
        assert torch.equal(part.argsort(), sum(parts).argsort())


def test_window_scorers_say_what_they_need():
    k = torch.zeros(40, 2, 8)
    for name, needed in {
        "tova": "the queries of the last tokens",
        "lagkv": "the values of the prompt",
        "leverage": "the model's rotary embedding",
        "h2o": "the queries of all tokens",
    }.items():
        with pytest.raises(ValueError, match=f"scorer '{name}' needs {needed}"):
            make_scorer(name).score(None, k, scale=1.0)


def test_random_is_random():
    """No token is kept more often than chance has it, nor any pair of heads the same."""
    kept = []
    for seed in range(4):
        asked = Asked(0, "random", 1032, seed=seed)
        for layer in range(4):
            kept += [set(row) for row in asked.scores(layer=layer).topk(250).indices.tolist()]
    times = np.bincount([token for tokens in kept for token in tokens], minlength=1000)
    assert abs(times.mean() - 12) < 1e-9 and 2.5 < times.std() < 3.5  # binomial: 3
    shared = [len(a & b) for i, a in enumerate(kept) for b in kept[:i]]
    assert abs(np.mean(shared) - 62.5) < 1 and max(shared) < 110


@pytest.mark.parametrize("halves", [True, False])
def test_rotation_is_undone(halves):
    angle = torch.rand(30, 3) * 6
    table = torch.cat([angle.cos(), angle.sin()], dim=1)
    embedding = Rope(lambda: table * 1.3, halves)  # some models scale it
    x = torch.randn(20, 2, 8)
    turned = embedding.turn(x, *(part[5:25, None] * 1.3 for part in table.chunk(2, dim=1)))
    assert not torch.allclose(turned, x)
    torch.testing.assert_close(embedding.undo(turned, 5), x)
    torch.testing.assert_close(turned[..., 6:], x[..., 6:])  # the rest of a head is not rotated
    first = (0, 3) if halves else (0, 1)
    plain = torch.complex(x[0, 0, first[0]], x[0, 0, first[1]]) * torch.polar(
        torch.tensor(1.3), angle[5, 0]
    )
    torch.testing.assert_close(turned[0, 0, list(first)], torch.view_as_real(plain))

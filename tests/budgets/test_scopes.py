# SPDX-License-Identifier: Apache-2.0
"""Kept sets against the papers' formulae, and the properties that admission rests on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.budgets import SCOPES, BudgetSpec, Keep, make_scope, make_scorer
from fairkv_sglang.model import Sliding
from fairkv_sglang.profiles import HeadProfile, uniform_profile
from fairkv_tests.budgets_reference import ada_kv_kept, static_kept, threshold_kept
from fairkv_tests.kept_tokens import select

LAYERS = 2


@st.composite
def cases(draw, names=tuple(SCOPES)):
    """A scope, a prompt length and scores, which are mostly tied."""
    heads = draw(st.integers(1, 6))
    window = draw(st.integers(0, 6))
    total = draw(st.integers(1, 60))
    alpha = draw(st.sampled_from([0.0, 0.05, 0.2, 0.29, 0.5, 1.0]))
    if draw(st.booleans()):
        size = {"tokens": draw(st.integers(window + 1, 70))}
    else:
        size = {"ratio": draw(st.sampled_from([0.01, 0.25, 0.5, 0.7, 1.0]))}
    spec = BudgetSpec(**size)
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    profile = HeadProfile(None, rng.random((LAYERS, heads)) ** 4 + 1e-6)
    name = draw(st.sampled_from(names))
    values = {"floor_alpha": alpha, "threshold": draw(st.sampled_from([-1.0, 0.02, 0.5, 2.0]))}
    values["beta"] = draw(st.sampled_from([1, 3, 20]))
    options = {key: value for key, value in values.items() if key in SCOPES.options(name)}
    scope = SCOPES.make(name, spec, LAYERS, heads, window, profile, **options)
    scope.home_size = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    if draw(st.booleans()):  # as a request has it: another budget, protected tokens
        own = draw(st.sampled_from([None, BudgetSpec(tokens=window + 9), BudgetSpec(ratio=0.4)]))
        scope = scope.variant(own, draw(st.integers(0, max(total - window, 0))))
    n, m = len(together(scope)), max(total - scope.window, 0)
    if draw(st.booleans()):
        scores = rng.integers(0, 4, (n, m)).astype(np.float32)
    else:
        scores = (rng.random((n, m)) * rng.random((n, 1)) ** 3).astype(np.float32)
    return scope, total, torch.from_numpy(scores)


def together(scope):
    """Heads whose scores are selected from at once: those of a layer, or of the model."""
    return range(scope.num_heads * (scope.num_layers if scope.spans_layers else 1))


def _rows(kept):
    return [
        row[:count] for row, count in zip(kept.indices.tolist(), kept.counts.tolist(), strict=True)
    ]


def _reference(scope, layer, heads, scores, total):
    budget = scope.budget(total)
    if scope.name == "threshold":
        options = (scope.threshold, scope.floor_alpha, scope.sink)
        return threshold_kept(scores.tolist(), budget, scope.window, total, *options)
    if scope.input_dependent:
        alpha = scope.floor_alpha
        return ada_kv_kept(scores.tolist(), heads, budget, scope.window, alpha, total)
    counts = scope.expected(total)[layer, heads].tolist()
    return static_kept(scores.tolist(), counts, total)


@settings(max_examples=300, deadline=None)
@given(case=cases(), layer=st.integers(0, LAYERS - 1))
def test_kept_sets_equal_the_formulae(case, layer):
    scope, total, scores = case
    heads = list(together(scope))
    kept = select(scope, layer, heads, scores, total)
    assert _rows(kept) == _reference(scope, layer, heads, scores, total)


@settings(max_examples=300, deadline=None)
@given(case=cases(), layer=st.integers(0, LAYERS - 1))
def test_kept_sets_are_well_formed(case, layer):
    scope, total, scores = case
    heads = together(scope)
    kept = select(scope, layer, heads, scores, total)
    assert kept.counts.dtype == kept.indices.dtype == torch.int64
    assert kept.indices.shape == (len(heads), int(kept.counts.max()))
    window = range(max(total - scope.window, 0), total)
    floor = min(total, scope.window + (scope.floor(total) if scope.input_dependent else 0))
    for row, padded in zip(_rows(kept), kept.indices.tolist(), strict=True):
        assert row == sorted(set(row)) and set(row) <= set(range(total))
        assert set(padded[len(row) :]) <= {-1}
        assert set(window) <= set(row)
        assert floor <= len(row) <= total
    counts = scope.counts(layer, heads, scores, total)
    assert counts.tolist() == kept.counts.tolist()


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_totals_are_kept(case):
    scope, total, scores = case
    heads, budget = scope.num_heads, scope.budget(total)
    layers = [
        select(scope, i, together(scope), scores, total).counts.sum() for i in range(scope.budgets)
    ]
    whole, expected = LAYERS * heads * budget, scope.expected(total)
    if scope.name in ("head", "pyramid", "model"):
        assert sum(layers) == whole == expected.sum()
    elif scope.name == "threshold":
        assert max(layers) <= heads * budget and (expected == budget).all()
    elif scope.name == "retrieval":
        whole = scope.profile.shares > scope.profile.shares.mean() * (1 + 1e-6)
        assert sum(layers) == np.where(whole, total, budget).sum() == expected.sum()
    else:
        assert [int(count) for count in layers] == [heads * budget] * LAYERS
        assert expected.sum(axis=1).tolist() == [heads * budget] * LAYERS
    assert expected.max() <= total and expected.min() >= min(scope.window, total)


def layer_counts(scope, layer, scores, total):
    """Kept tokens of all heads of a layer, as the ranks find them: scope rank home by home."""
    everyone = together(scope)
    size = scope.home_size if scope.name == "rank" else len(everyone)
    counts = []
    for first in range(0, len(everyone), size):
        group = range(first, first + size)
        counts += scope.counts(layer, group, scores[first : first + size], total).tolist()
    return counts


def by_layer(scope, group):
    """Heads of each layer; the same ones of all layers where each layer has its own budget."""
    if not scope.spans_layers:
        return [group] * LAYERS
    heads = scope.num_heads
    return [[head % heads for head in group if head // heads == i] for i in range(LAYERS)]


@settings(max_examples=400, deadline=None)
@given(case=cases(), data=st.data())
def test_bounds_hold_whatever_the_scores(case, data):
    """Any set of heads: those that a rank owns, or those that one rank sends to another."""
    scope, total, scores = case
    everyone = together(scope)
    group = sorted(data.draw(st.sets(st.sampled_from(everyone))))
    counts = layer_counts(scope, 0, scores, total)
    actual = sum(counts[head] for head in group)
    bound = scope.bound(total, by_layer(scope, group))
    assert bound.shape == (scope.budgets,) and bound.dtype == np.int64
    assert actual <= bound[0] <= len(group) * total
    caps = scope.per_head_bound(total).ravel()
    assert all(counts[head] <= caps[head] for head in group)
    # Alone the bound of heads is that of each, together they share: it never adds up to more.
    alone = sum(scope.most(0, total, [head]) for head in group)
    assert bound[0] == scope.most(0, total, group) <= alone
    assert alone == caps[group].sum()
    whole = {head // scope.home_size for head in group}
    known = scope.name == "rank" and len(group) == len(whole) * scope.home_size
    exact = not scope.input_dependent or known or len(group) == len(everyone)
    exact = exact and scope.name != "threshold"
    assert actual == bound[0] or not exact


@settings(max_examples=200, deadline=None)
@given(case=cases(), data=st.data())
def test_more_heads_are_never_bounded_by_less(case, data):
    """An owner of more heads never has a smaller bound, and no order of heads matters."""
    scope, total, _ = case
    heads = data.draw(st.permutations(together(scope)))
    bounds = [scope.most(1, total, heads[:n]) for n in range(len(heads) + 1)]
    assert bounds == sorted(bounds) and bounds[0] == 0
    assert all(type(bound) is int for bound in bounds)
    expected = scope.expected(total)
    of_all = expected.sum() if scope.spans_layers else expected[1].sum()
    assert bounds[-1] == scope.most(1, total, sorted(heads)) == of_all


@settings(max_examples=150, deadline=None)
@given(case=cases(names=("rank",)), data=st.data())
def test_homes_bound_each_for_itself(case, data):
    """What heads of one home keep says nothing about another's."""
    scope, total, _ = case
    group = sorted(data.draw(st.sets(st.sampled_from(range(scope.num_heads)))))
    size, parts = scope.home_size, {}
    for head in group:
        parts.setdefault(head // size, []).append(head)
    assert scope.most(0, total, group) == sum(scope.most(0, total, p) for p in parts.values())
    budget = size * scope.budget(total)
    for part in parts.values():
        assert scope.most(0, total, part) <= budget
        assert len(part) < size or scope.most(0, total, part) == budget


@settings(max_examples=150, deadline=None)
@given(case=cases(names=("rank",)), data=st.data())
def test_rank_bound_is_reached(case, data):
    """Scores that give heads of a home everything."""
    scope, total, scores = case
    size = scope.home_size
    first = data.draw(st.integers(0, scope.num_heads // size - 1)) * size
    group = sorted(data.draw(st.sets(st.sampled_from(range(first, first + size)), min_size=1)))
    scores = torch.zeros_like(scores)
    scores[group] = 1.0
    counts = np.array(layer_counts(scope, 0, scores, total))[group]
    assert counts.sum() == scope.most(0, total, group)


@settings(max_examples=100, deadline=None)
@given(case=cases(names=("layer", "model")), data=st.data())
def test_bound_is_reached(case, data):
    """Scores that give the group everything."""
    scope, total, scores = case
    everyone = together(scope)
    group = sorted(data.draw(st.sets(st.sampled_from(everyone), min_size=1)))
    scores = torch.zeros_like(scores)
    scores[group] = 1.0
    counts = select(scope, 0, everyone, scores, total).counts[group]
    assert int(counts.sum()) == scope.bound(total, by_layer(scope, group))[0]


@settings(max_examples=150, deadline=None)
@given(case=cases(), data=st.data())
def test_order_of_rows_does_not_matter(case, data):
    """A plan lists the heads of a rank in any order; ties still go by head index."""
    scope, total, scores = case
    heads = list(together(scope))
    order = data.draw(st.permutations(heads))
    plain = _rows(select(scope, 1, heads, scores, total))
    permuted = _rows(select(scope, 1, order, scores[order], total))
    assert permuted == [plain[head] for head in order]


@settings(max_examples=100, deadline=None)
@given(case=cases(names=("uniform", "head", "pyramid", "retrieval", "threshold")), data=st.data())
def test_scopes_of_single_heads_do_not_care_which_heads_are_together(case, data):
    scope, total, scores = case
    heads = list(range(scope.num_heads))
    part = data.draw(st.lists(st.sampled_from(heads), unique=True))
    together = _rows(select(scope, 1, heads, scores, total))
    assert _rows(select(scope, 1, part, scores[part], total)) == [together[h] for h in part]


@settings(max_examples=100, deadline=None)
@given(case=cases(names=("layer",)))
def test_rank_at_tp_1_equals_layer(case):
    scope, total, scores = case
    heads = range(scope.num_heads)
    rank = SCOPES.make(
        "rank",
        scope.spec,
        LAYERS,
        scope.num_heads,
        scope.window,
        scope.profile,
        scope.sink,
        scope.protected,
        floor_alpha=scope.floor_alpha,
    )
    assert rank.home_size == scope.num_heads  # until a rank says what is at home on it
    group = range(scope.num_heads // 2 + 1)
    assert rank.most(0, total, group) == scope.most(0, total, group)
    assert rank.per_head_bound(total).tolist() == scope.per_head_bound(total).tolist()
    assert _rows(select(rank, 0, heads, scores, total)) == (
        _rows(select(scope, 0, heads, scores, total))
    )


@pytest.mark.parametrize("name", SCOPES)
def test_a_budget_holds_the_protected_tokens_and_rises_where_it_cannot(name):
    profile = HeadProfile(None, np.random.default_rng(0).random((LAYERS, 4)) + 0.1)
    scope = SCOPES.make(name, BudgetSpec(tokens=20), LAYERS, 4, 8, profile, 3)
    assert scope.variant() is scope
    assert scope.variant(None, 5) is scope.variant(scope.spec, 5)
    budgets = {p: scope.variant(None, p).budget(100) for p in (0, 5, 9, 10, 60, 89, 92)}
    # Window 8 and sink 3 need 11 tokens beside the protected ones.
    assert budgets == {0: 20, 5: 20, 9: 20, 10: 21, 60: 71, 89: 100, 92: 100}
    for protected in (5, 60):
        own = scope.variant(None, protected)
        assert own.expected(100).min() >= protected + 8
        assert (own.per_head_bound(100) >= own.expected(100)).all()
    with pytest.raises(ValueError, match=r"10 tokens is below window 8 .* sink 3: use at least 11"):
        scope.variant(BudgetSpec(tokens=10), 5)


@pytest.mark.parametrize("name", SCOPES)
def test_a_variant_is_a_scope_made_with_its_budget(name):
    """And has the homes of the rank."""
    profile = HeadProfile(None, np.random.default_rng(1).random((LAYERS, 4)) + 0.1)
    spec = BudgetSpec(ratio=0.3)
    scope, other = (SCOPES.make(name, x, LAYERS, 4, 8, profile) for x in (BudgetSpec(40), spec))
    scope.home_size = other.home_size = 2
    variant = scope.variant(spec)
    assert variant is scope.variant(BudgetSpec(ratio=0.3))
    for total in (5, 30, 200):
        assert np.array_equal(variant.expected(total), other.expected(total))
        assert np.array_equal(variant.per_head_bound(total), other.per_head_bound(total))
        heads = [[0, 3], [1, 2]]
        assert np.array_equal(variant.bound(total, heads), other.bound(total, heads))


@pytest.mark.parametrize("name", SCOPES)
def test_a_request_with_another_method_has_the_scope_of_such_a_server(name):
    """Another scope, another scorer's window and sinks, and then its own budget and tokens."""
    profile = HeadProfile(None, np.random.default_rng(1).random((LAYERS, 4)) + 0.1)
    server = SCOPES.make("threshold", BudgetSpec(tokens=40), LAYERS, 4, 8, profile, threshold=3.0)
    options = (("floor_alpha", 0.5),) if "floor_alpha" in SCOPES.options(name) else ()
    scorer = make_scorer("lagkv", window=45, sink=3)  # more than the server's budget holds
    other = SCOPES.make(name, BudgetSpec(ratio=0.3), LAYERS, 4, 45, profile, 3, **dict(options))
    server.home_size = other.home_size = 2
    keep = Keep(BudgetSpec(ratio=0.3), ((0, 7), (193, 200)), scorer, (name, options))
    own, other = keep.scope(server, 200), other.variant(None, 7)  # the window has the others
    assert own is keep.scope(server, 200) and type(own) is type(other)
    for field in ("spec", "window", "sink", "protected", "home_size", "floor_alpha"):
        assert getattr(own, field, None) == getattr(other, field, None)
    assert np.array_equal(own.expected(200), other.expected(200))
    alone = Keep(scorer=make_scorer("keydiff", window=39)).scope(server, 200)
    assert (alone.name, alone.threshold, alone.window) == ("threshold", 3.0, 39)


@pytest.mark.parametrize("name", ["layer", "rank"])
def test_dispersed_head_gains(name):
    """Ada-KV's sign: the head that spreads its attention needs more tokens, not fewer."""
    scores = torch.full((2, 100), 1e-6)
    scores[0, :3] = torch.tensor([0.5, 0.3, 0.19])  # concentrated
    scores[1, :60] = 1 / 60  # dispersed
    scope = SCOPES[name](BudgetSpec(tokens=24), 1, 2, 4, None)
    counts = select(scope, 0, [0, 1], scores, 104).counts.tolist()
    assert counts == [4 + 3, 4 + 37]  # of 20 * 2 tokens
    floored = SCOPES.make(name, BudgetSpec(tokens=24), 1, 2, 4, floor_alpha=0.5)
    counts = select(floored, 0, [0, 1], scores, 104).counts.tolist()
    assert counts == [12, 2 * 24 - 12]  # half of the mean, the window included


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.45, 1.0])
def test_ada_kv_floor_is_kvpress(alpha):
    """The best int(B * alpha) tokens of each head, its window among them, are safe; then the best
    of all heads.
    """
    rng = np.random.default_rng(0)
    for _ in range(30):
        scores = torch.from_numpy(rng.random((4, 200)) ** rng.integers(1, 9, (4, 1))).float()
        scope = SCOPES.make("layer", BudgetSpec(tokens=82), 1, 4, 32, floor_alpha=alpha)
        safe = torch.cat([scores, torch.full((4, 32), 2.0)], dim=1)
        safe.scatter_(1, safe.topk(int(82 * alpha), dim=1).indices, 3.0)
        kept = torch.topk(safe.flatten(), 4 * 82).indices
        rows = [sorted((kept[kept // 232 == head] % 232).tolist()) for head in range(4)]
        assert _rows(select(scope, 0, range(4), scores, 232)) == rows


@pytest.mark.parametrize("scorer", ["snapkv", "streaming"])
@pytest.mark.parametrize("scope", ["uniform", "layer", "rank", "head"])
def test_equal_scores_give_equal_budgets(scorer, scope):
    """With the same scores in every head there is nothing to balance."""
    method = make_scorer(scorer)
    k = torch.randn(300, 1, 8, generator=torch.Generator().manual_seed(0)).expand(-1, 4, -1)
    q = torch.randn(32, 1, 2, 8, generator=torch.Generator().manual_seed(1)).expand(-1, 4, -1, -1)
    scores = method.score(q, k, scale=0.3)
    budgets = make_scope(scope, BudgetSpec(tokens=64), 2, 4, method, uniform_profile(2, 4))
    counts = select(budgets, 0, range(4), scores, 300).counts.tolist()
    if scorer == "streaming" or not budgets.input_dependent:
        assert counts == [64] * 4
    else:  # max pooling makes ties inside a head, and those go by head index
        assert sum(counts) == 256 and max(counts) - min(counts) <= 7


def test_streaming_keeps_sinks_and_recent_tokens():
    method = make_scorer("streaming", sink=4, window=8)
    scope = make_scope("uniform", BudgetSpec(tokens=20), 1, 2, method)
    scores = method.score(None, torch.zeros(50, 2, 4), scale=1.0)
    wanted = [*range(4), *range(34, 50)]
    assert select(scope, 0, [0, 1], scores, 50).indices.tolist() == [wanted, wanted]


@pytest.mark.parametrize("name", list(SCOPES))
@pytest.mark.parametrize("total", [1, 31, 32, 33, 40])
def test_prompt_within_the_budget_keeps_everything(name, total):
    scorer = make_scorer("snapkv")
    scope = make_scope(name, BudgetSpec(tokens=40), 3, 2, scorer, uniform_profile(3, 2))
    heads = together(scope)
    scores = torch.rand(len(heads), max(total - 32, 0))
    kept = select(scope, 1, heads, scores, total)
    assert kept.counts.tolist() == [total] * len(heads)
    assert kept.indices.tolist() == [list(range(total))] * len(heads)
    assert (scope.expected(total) == total).all()
    assert (scope.per_head_bound(total) == total).all()
    bound = [total, 2 * total, 0]
    assert scope.bound(total, [[0], [0, 1], []]).tolist() == (
        [sum(bound)] if scope.spans_layers else bound
    )


@pytest.mark.parametrize("name", list(SCOPES))
@pytest.mark.parametrize("total", [5, 39, 40, 41, 300])
def test_layers_with_a_sliding_window_have_no_part_in_budgets(name, total):
    """The others keep what a model without them would; these their window, of any prompt."""
    scorer, spec = make_scorer("snapkv", window=8), BudgetSpec(ratio=0.25)
    shares = np.random.default_rng(3).random((5, 4)) + 0.01
    sliding, others = Sliding(40, (0, 1, 3)), [2, 4]
    scope = make_scope(name, spec, 5, 4, scorer, HeadProfile(None, shares), sliding)
    alone = make_scope(name, spec, 2, 4, scorer, HeadProfile(None, shares[others]))
    in_window = min(total, 39)
    for found, wanted in (
        (scope.expected(total), alone.expected(total)),
        (scope.per_head_bound(total), alone.per_head_bound(total)),
    ):
        assert found[others].tolist() == wanted.tolist()
        assert (found[[0, 1, 3]] == in_window).all()
    assert scope.longest(total) == alone.per_head_bound(total).max()
    groups = [[0], [1, 2], [0, 3], [], [2]]
    bound = scope.bound(total, groups).tolist()
    others_bound = alone.bound(total, [groups[2], groups[4]]).tolist()
    if scope.spans_layers:
        assert bound == [others_bound[0] + 3 * in_window]
        scores = torch.rand(8, max(total - 8, 0))
        counts = (each.counts(0, range(8), scores, total) for each in (scope, alone))
        assert torch.equal(*counts)
    else:
        assert bound[0] == in_window and bound[1] == 2 * in_window and bound[3] == 0
        assert [bound[2], bound[4]] == others_bound
        scores = torch.rand(4, max(total - 8, 0))
        for layer, same in ((2, 0), (4, 1)):
            assert torch.equal(
                scope.counts(layer, range(4), scores, total),
                alone.counts(same, range(4), scores, total),
            )
        assert scope.counts(3, range(4), scores, total).tolist() == [in_window] * 4
    assert scope.variant(BudgetSpec(ratio=1.0)).expected(total)[:, 0].tolist() == [
        total if layer in others else in_window for layer in range(5)
    ]


def test_floor_is_free_of_rounding_noise():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    scope = SCOPES.make("layer", BudgetSpec(tokens=100), 1, 2, 8, floor_alpha=0.29)
    assert scope.floor(1000) == 29 - 8


@pytest.mark.parametrize(
    ("ratio", "total", "budget"),
    [(0.25, 1000, 250), (0.07, 100, 33), (0.07, 600, 42), (0.5, 65, 33), (1.0, 77, 77)],
)
def test_budget_by_ratio(ratio, total, budget):
    """ceil(ratio * N), at least window + 1, at most N; no rounding noise."""
    scope = make_scope("uniform", BudgetSpec(ratio=ratio), 1, 1, make_scorer("snapkv"))
    assert scope.budget(total) == budget
    assert scope.budget(20) == 20


def test_budget_by_ratio_within_bounds():
    spec = BudgetSpec(ratio=0.25, least=100, most=300)
    scope = make_scope("uniform", spec, 1, 1, make_scorer("snapkv"))
    found = {total: scope.budget(total) for total in (60, 100, 200, 500, 1000, 1200, 9000)}
    assert found == {60: 60, 100: 100, 200: 100, 500: 125, 1000: 250, 1200: 300, 9000: 300}
    few = make_scope("uniform", BudgetSpec(ratio=0.25, least=8), 1, 1, make_scorer("snapkv"))
    assert few.budget(40) == 33  # a window and one token in any case
    with pytest.raises(ValueError, match="a budget of 20 tokens is below window 32"):
        make_scope("uniform", BudgetSpec(ratio=0.5, most=20), 1, 1, make_scorer("snapkv"))


def test_head_caps_follow_the_profile():
    profile = HeadProfile("tiny", np.array([[1.0, 3.0], [4.0, 0.0]]))
    scope = SCOPES["head"](BudgetSpec(tokens=132), 2, 2, 32, profile)
    # floor 32 + 1, more than a fifth of 132; the rest, 528 - 33, in proportion 1 : 3 : 4.
    assert scope.expected(10_000).tolist() == [[62, 186], [247, 33]]
    # Heads that are full pass on what they can't use.
    assert scope.expected(150).tolist() == [[150, 150], [150, 78]]
    assert scope.expected(132).tolist() == [[132, 132], [132, 132]]


def test_pyramid_goes_down_in_equal_steps():
    scope = SCOPES.make("pyramid", BudgetSpec(tokens=132), 5, 2, 32, beta=20)
    # Beyond the window the mean is 100: 5 in the last layer, 195 in the first, steps of 47.5.
    assert scope.expected(10_000)[:, 0].tolist() == [227, 180, 132, 84, 37]
    # No layer keeps more than there is; the last one gets what the first can't take.
    assert scope.expected(180)[:, 0].tolist() == [180, 156, 132, 108, 84]
    assert (scope.expected(132) == 132).all()
    assert SCOPES.make("pyramid", BudgetSpec(tokens=132), 1, 2, 32).expected(999).tolist() == [
        [132, 132]
    ]
    sinks = SCOPES.make("pyramid", BudgetSpec(tokens=44), 3, 1, 32, None, 4, beta=20)
    assert sinks.expected(999).ravel().tolist() == [32 + 20, 32 + 12, 32 + 4]


def test_threshold_keeps_what_is_above_it():
    scope = SCOPES.make("threshold", BudgetSpec(tokens=24), 1, 4, 4, threshold=0.5, floor_alpha=0.5)
    scores = torch.full((4, 100), 0.5)
    scores[1, :9] = 0.6
    scores[2, :50] = 0.6
    scores[3] = torch.nan
    # At least half of 24, at most 24; what equals the threshold is not above it.
    assert scope.counts(0, range(4), scores, 104).tolist() == [12, 13, 24, 12]
    kept = select(scope, 0, range(4), scores, 104)
    assert kept.indices[1, :13].tolist() == [*range(9), *range(100, 104)]


def test_layer_expectation_follows_the_profile_inside_each_layer():
    profile = HeadProfile("tiny", np.array([[1.0, 3.0], [40.0, 40.0]]))
    scope = SCOPES["layer"](BudgetSpec(tokens=132), 2, 2, 32, profile)
    assert scope.expected(10_000).tolist() == [[66, 198], [132, 132]]
    without = SCOPES["layer"](BudgetSpec(tokens=132), 2, 2, 32, None)
    assert (without.expected(10_000) == 132).all()


def test_one_budget_for_all_layers():
    """By hand: two layers of one head, window 2, mean budget 5 of 12, so 6 tokens compete."""
    scope = SCOPES.make("model", BudgetSpec(tokens=5), 2, 1, 2, floor_alpha=0.0)
    scores = torch.tensor([[4.0, 4, 4, 4, 4, 1, 1, 1, 1, 1], [3.0, 3, 3, 4, 2, 2, 2, 2, 2, 2]])
    kept = select(scope, 0, [0, 1], scores, 12)
    assert _rows(kept) == [[0, 1, 2, 3, 4, 10, 11], [3, 10, 11]]  # ties go to the lower layer
    # With a floor of 4, two of them beside the window.
    floored = SCOPES.make("model", BudgetSpec(tokens=5), 2, 1, 2, floor_alpha=0.8)
    assert select(floored, 0, [0, 1], scores, 12).counts.tolist() == [6, 4]
    # A head alone, and both together.
    assert scope.bound(12, [[0], []]).tolist() == [2 + 6]
    assert scope.bound(12, [[0], [0]]).tolist() == [10]
    profile = HeadProfile("tiny", np.array([[1.0], [3.0]]))
    scope = SCOPES["model"](BudgetSpec(tokens=132), 2, 1, 32, profile)
    assert scope.expected(10_000).tolist() == [[66], [198]]


def test_a_single_head_may_take_what_the_others_floors_leave():
    scope = SCOPES.make("layer", BudgetSpec(tokens=132), 1, 4, 32, floor_alpha=0.5)
    assert (scope.per_head_bound(10_000) == 4 * 132 - 3 * 66).all()
    assert (scope.per_head_bound(200) == 200).all()


def test_rank_with_no_heads_of_a_request():
    """All copies of a request's heads may have their owners elsewhere."""
    for name in ("uniform", "rank"):
        scope = SCOPES[name](BudgetSpec(tokens=40), 1, 4, 32, None)
        kept = select(scope, 0, [], torch.zeros(0, 68), 100)
        assert kept.counts.shape == (0,) and kept.indices.shape == (0, 0)
        assert scope.bound(100, [[]]).tolist() == [0]


def test_cached_tables_can_not_be_written_to():
    scope = SCOPES["layer"](BudgetSpec(tokens=40), 1, 4, 32, None)
    for table in (scope.expected(99), scope.per_head_bound(99), scope.bound(99, [[0]])):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0
    assert scope.expected(99) is scope.expected(99)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either in tokens or as a ratio"),
        ({"tokens": 5, "ratio": 0.5}, "either in tokens or as a ratio"),
        ({"tokens": 0}, "at least 1 token"),
        ({"ratio": 0.0}, "above 0 and at most 1"),
        ({"ratio": float("nan")}, "above 0 and at most 1"),
        ({"ratio": 25}, "above 0 and at most 1"),
        ({"tokens": 50, "most": 90}, "bounds of a budget that is a ratio"),
        ({"ratio": 0.5, "least": 9, "most": 8}, "at least 9 and at most 8"),
    ],
)
def test_bad_budget_is_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        BudgetSpec(**options)


def test_bad_scope_is_one_clear_line():
    scorer, spec = make_scorer("streaming"), BudgetSpec(tokens=36)
    make_scope("uniform", spec, 2, 4, scorer)
    for name, budget, profile, message in [
        (
            "heads",
            spec,
            None,
            "unknown budget scope 'heads'; known: head, layer, model, pyramid, rank, retrieval, "
            "threshold, uniform",
        ),
        ("head", spec, None, "choose scope layer, model, pyramid, rank, threshold or uniform"),
        ("layer", spec, uniform_profile(2, 8), "2 layers x 8 KV heads, but the model has 2 x 4"),
        ("uniform", BudgetSpec(tokens=35), None, "below window 32 + sink 4: use at least 36"),
    ]:
        with pytest.raises(ValueError) as error:
            make_scope(name, budget, 2, 4, scorer, profile)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="floor_alpha: 2 must be at most 1"):
        make_scope("layer", spec, 2, 4, scorer, floor_alpha=2)
    with pytest.raises(ValueError, match="'uniform' has no option floor_alpha; it has: none"):
        make_scope("uniform", spec, 2, 4, scorer, floor_alpha=0.1)


def test_select_refuses_what_does_not_fit():
    scope = SCOPES["layer"](BudgetSpec(tokens=40), 1, 4, 32, None)
    for heads, shape, message in [
        ([0, 1, 2, 3], (4, 67), r"scores have shape \[4, 67\], expected \[4, 68\]"),
        ([0, 1, 2], (3, 68), "needs all 4 heads"),
        ([0, 1, 2, 2], (4, 68), "not distinct heads"),
        ([0, 1, 2, 4], (4, 68), "not distinct heads of 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            select(scope, 0, heads, torch.zeros(shape), 100)
    with pytest.raises(ValueError, match="heads of 2 layers, expected 1"):
        scope.bound(100, [[0], [1]])

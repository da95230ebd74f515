# SPDX-License-Identifier: Apache-2.0
"""What a request wants kept: spans of tokens, and the scope that its budget makes."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from fairkv_sglang.attention.choose import protect
from fairkv_sglang.budgets import AS_SERVER, BudgetSpec, Keep, make_scope, make_scorer, pick
from fairkv_sglang.budgets.keep import merged

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted).map(tuple))


@given(given=spans, before=st.integers(0, 50))
def test_spans_are_the_tokens_that_were_named(given, before):
    """Overlapping, touching, empty, beyond the end."""
    made = merged(given)
    named = {token for start, end in given for token in range(start, end)}
    assert [token for start, end in made for token in range(start, end)] == sorted(named)
    assert all(start < end for start, end in made)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(made))
    positions = Keep(spans=made).positions(before).tolist()
    assert positions == sorted(token for token in named if token < before)


def scope_of(budget: int = 20):
    return make_scope("layer", BudgetSpec(budget), 1, 2, make_scorer("snapkv", window=8))


def test_only_tokens_before_the_window_count_as_protected():
    scope, keep = scope_of(), Keep(spans=((2, 5), (90, 96), (99, 300)))
    assert keep.scope(scope, 100).protected == 3 + 2
    assert keep.scope(scope, 97).protected == 3
    assert keep.scope(scope, 12).protected == 2
    assert keep.scope(scope, 8) is scope and keep.scope(scope, 1) is scope
    assert keep.scope(scope, 300).protected == 3 + 6 + 193
    assert AS_SERVER.scope(scope, 100) is scope


def test_nothing_stands_beside_a_protected_token():
    """Not an infinite score before it."""
    scores = torch.tensor([[torch.inf, torch.nan, 3.0, torch.inf, -torch.inf]])
    made = protect(scores, torch.tensor([2, 4]))
    assert pick(made, torch.tensor([2]), 5).indices.tolist() == [[2, 4]]
    assert pick(made, torch.tensor([4]), 5).indices.tolist() == [[0, 2, 3, 4]]
    assert scores[0, 2] == 3  # the scores themselves are left alone

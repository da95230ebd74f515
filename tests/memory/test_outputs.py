# SPDX-License-Identifier: Apache-2.0
"""Requests that are compressed while they write: when, to what, and what all books say of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairkv_sglang.budgets import AS_SERVER, BudgetSpec, Keep, make_scope, make_scorer
from fairkv_sglang.memory.outputs import OutputRule
from fairkv_sglang.memory.recent import RecentQueries
from fairkv_sglang.placement import Plan
from fairkv_sglang.profiles import HeadProfile
from fairkv_tests.core_cases import (
    QUICK,
    SCOPES,
    make_books,
    random_keep,
    random_plan,
    random_scope,
    seeds,
)
from fairkv_tests.engine_model import Engine, Request

SLACK, WINDOW = 64, 8


def rule(name: str = "uniform", *, tokens: int | None = None, **options: object) -> OutputRule:
    profile = None
    if name == "head":
        profile = HeadProfile(model=None, shares=np.array([[0.4, 0.3, 0.2, 0.1]]), meta={})
    scorer = make_scorer("streaming", sink=2, window=WINDOW)
    spec = BudgetSpec(tokens, **options)  # type: ignore[arg-type]
    return OutputRule(make_scope(name, spec, 1, 4, scorer, profile), SLACK)


def test_a_compressed_prompt_goes_back_to_what_it_kept() -> None:
    bound = rule("layer", tokens=100).bound(500)
    assert bound is not None and bound.whole is None and bound.due == SLACK
    kept = np.array([[250, 90, 40, 20]])
    assert bound.most(kept).tolist() == [[314, 154, 104, 84]]


def test_a_prompt_below_its_budget_fills_it_first() -> None:
    """And is compressed when it is a slack above it, however short the prompt was."""
    for prompt in (1, 30, 99, 100):
        bound = rule(tokens=100).bound(prompt)
        assert bound is not None and prompt + bound.due == 100 + SLACK
        assert bound.whole is not None and bound.whole.tolist() == [[100] * 4]
        assert bound.most(np.full((1, 4), prompt)).max() == 100 + SLACK


def test_shares_of_a_profile_hold_for_outputs() -> None:
    """Heads go back to their own shares; the hungriest may then hold more than before."""
    bound = rule("head", tokens=100).bound(40)
    assert bound is not None and bound.whole is not None
    assert bound.whole.tolist() == [[160, 120, 80, 40]]
    assert bound.most(np.full((1, 4), 40)).tolist() == [[224, 184, 164, 164]]


def test_the_budget_of_a_request_is_that_of_its_output() -> None:
    """A share is one of the prompt, but of a short one no budget for its output."""
    server = rule(ratio=0.25, least=80)

    def target(prompt: int, **spec: object) -> list[list[int]] | None:
        keep = Keep(BudgetSpec(**spec)) if spec else AS_SERVER  # type: ignore[arg-type]
        bound = server.bound(prompt, keep)
        assert bound is not None
        return bound.whole.tolist() if bound.whole is not None else None

    assert target(60) == [[80] * 4]  # the server's least
    assert target(60, tokens=200) == [[200] * 4]
    assert target(60, ratio=0.9) is None  # 54 of the prompt are kept, and so of its output
    assert target(9, ratio=0.9) == [[80] * 4]
    assert target(400, tokens=30) is None
    assert server.bound(60, Keep(BudgetSpec(ratio=1.0))) is None  # "compress": false


@pytest.mark.parametrize("name", SCOPES)
@QUICK
@given(seed=seeds, prompt=st.integers(1, 300))
def test_what_a_request_may_hold(name: str, seed: int, prompt: int) -> None:
    """For every scope and every wish: a head goes back to tokens that it has, and to its window."""
    rng = np.random.default_rng(seed)
    scope = random_scope(rng, name, 2, 4)
    keep = random_keep(rng, scope)
    bound = OutputRule(scope, SLACK).bound(prompt, keep)
    if bound is None:
        assert (keep.spec or scope.spec).ratio == 1.0
        return
    of_prompt = keep.scope(scope, prompt)
    if bound.whole is None:
        assert of_prompt.budget(prompt) < prompt and bound.due == SLACK
        return
    assert of_prompt.budget(prompt) == prompt and bound.due >= SLACK
    window = scope.window if keep.scorer is None else keep.scorer.window
    assert (bound.whole <= prompt + bound.due).all() and (bound.whole >= window).all()
    mean = prompt + bound.due - SLACK
    if name != "threshold":
        assert bound.whole.sum() == mean * bound.whole.size
    kept = np.full_like(bound.whole, prompt)
    assert (bound.most(kept) >= bound.whole + SLACK).all()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_long_output_holds_no_more_than_its_budget(overlap: bool) -> None:
    """On two ranks whose arena is too small for it; without compression it would be retracted."""
    rng = np.random.default_rng(5)
    plan = random_plan(rng, 2, 2, 4)
    spec = BudgetSpec(tokens=40)
    scope = make_scope("layer", spec, 2, 4, make_scorer("streaming", sink=0, window=4))
    engine = Engine(rng, plan, scope, overlap=overlap, mixed=False, chunk=64, page_size=1, slack=32)
    book = engine.books[0]
    assert (book.ledger.capacity < book.demand.expected_lanes * (2 * 360 // 16)).any()
    engine.calm = True
    engine.waiting = [Request(prompt, 360) for prompt in (3, 90)]
    engine.drain()
    outputs = book.outputs
    assert outputs is not None and engine.longest == 360
    assert engine.retractions == 0
    assert outputs.compressions == (360 + 3 - 40) // 32 + 360 // 32
    assert (outputs.freed_pages > 0).all()


def test_books_agree_after_a_compression() -> None:
    """Ledger, residents and router count what is left; a row that is freed at once leaves none."""
    plan = Plan.from_shares(np.ones((1, 1, 4)), "one rank")
    scope = make_scope("uniform", BudgetSpec(tokens=40), 1, 4, make_scorer("snapkv"))
    book = make_books(plan, scope, np.array([400]), rows=3, slack=32)[0]
    book.admit(1, 100)
    for _ in range(32):
        book.grow([1])
        assert not book.outputs.due
    assert book.ledger.held.tolist() == [4 * 5] and book.residents.reads.tolist() == [[4 * 72]]
    book.outputs.shrink()
    assert book.ledger.held.tolist() == [4 * 3] and book.residents.reads.tolist() == [[4 * 40]]
    assert book.router.loads().tolist() == [[4 * 40]]
    (due,) = book.outputs.due
    assert (due.row, due.length, due.held.tolist()) == (1, 132, [[72] * 4])
    for _ in range(8):
        book.grow([1])
    assert book.ledger.held.tolist() == [4 * 3] and book.outputs.left(1) == 24
    book.free(1)
    assert book.outputs.due == [] and book.outputs.left(1) is None
    assert book.check_idle() == []


def test_the_ring_of_recent_queries() -> None:
    """Oldest first, whatever the length was before; lanes move with their queries."""
    recent = RecentQueries(
        rows=3, window=4, lanes=5, group=2, head_dim=8, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    queries = torch.randn(11, 2, 5, 2, 8)  # step, request, lane
    for step, of_step in enumerate(queries):
        lengths = torch.tensor([6 + step, 40 + step])
        recent.begin(torch.tensor([2, 1]), lengths)
        recent.add(0, of_step[:, :3])
        recent.add(3, of_step[:, 3:])
    lanes = np.array([4, 0])
    for request, (row, length) in enumerate(((2, 16), (1, 50))):
        want = queries[7:, request][:, lanes].transpose(0, 1)
        assert torch.equal(recent.last(row, length, lanes), want)
    recent.shift(4, 1)
    assert torch.equal(recent.last(2, 16, np.array([1])), queries[7:, 0, 4][None])

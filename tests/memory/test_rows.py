# SPDX-License-Identifier: Apache-2.0
"""Rows, ledger and head pages together, through random lives of requests on several ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.placement import Plan
from fairkv_tests.core_cases import (
    QUICK,
    SCOPES,
    make_books,
    random_plan,
    random_scope,
    seeds,
    seen_before,
    splits,
)
from fairkv_tests.engine_model import Engine


@pytest.mark.parametrize("name", SCOPES)
@settings(QUICK, max_examples=15)
@given(
    seed=seeds,
    split=splits,
    overlap=st.booleans(),
    mixed=st.booleans(),
    chunk=st.sampled_from([32, 64, 1000]),
    page_size=st.sampled_from([1, 16]),
    forecast=st.sampled_from([1.0, 0.5, 0.01]),
    slack=st.sampled_from([None, 32, 48]),
)
def test_pages_of_random_lives(
    name: str,
    seed: int,
    split: tuple[int, int],
    overlap: bool,
    mixed: bool,
    chunk: int,
    page_size: int,
    forecast: float,
    slack: int | None,
) -> None:
    """Also where prompts need more than they are charged: no ledger, no device is overdrawn. With
    outputs that are compressed a request stays within what it may hold.
    """
    rng = np.random.default_rng(seed)
    heads, ranks = split
    plan = random_plan(rng, 2, ranks, heads)
    engine = Engine(
        rng,
        plan,
        random_scope(rng, name, 2, heads, ranks),
        overlap=overlap,
        mixed=mixed,
        chunk=chunk,
        page_size=page_size,
        forecast=forecast,
        slack=slack,
    )
    for _ in range(40):
        if rng.random() < 0.4:
            engine.submit()
        engine.turn()
    engine.drain()


def test_the_model_meets_what_it_is_for() -> None:
    """Retractions, aborts, overshoot and spills happen in these runs."""
    totals = np.zeros(5, dtype=int)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        plan = random_plan(rng, 2, 2, 4)
        engine = Engine(
            rng,
            plan,
            random_scope(rng, "layer", 2, 4, 2),
            overlap=True,
            mixed=False,
            chunk=48,
            page_size=1,
            forecast=(1.0, 0.6)[seed % 2],
        )
        for _ in range(60):
            engine.submit()
            engine.turn()
        engine.drain()
        totals += [
            engine.finished, engine.retractions, engine.aborts, engine.overshoot, engine.spills
        ]  # fmt: skip
    assert np.all(totals >= [40, 8, 2, 8, 8]), totals


def book_of_one_rank(name: str):
    rng = np.random.default_rng(2)
    scope = random_scope(rng, name, 1, 2)
    plan = Plan.from_shares(np.ones((1, 1, 2)), "one rank")
    return make_books(plan, scope, np.array([60]), rows=3)[0]


def counts_of(count: int) -> np.ndarray:
    return np.full((1, 2), count)


def store(book, row: int, count: int) -> None:
    """The last chunk of a prompt of which both heads keep ``count`` tokens."""
    book.begin_forward([row])
    pool = torch.zeros((count, 2, 8))
    positions = torch.arange(count)
    counts = torch.tensor([count, count])
    book.pages.kernels.store_kept(
        book.pages, row, 0, pool, pool, positions, positions.expand(2, -1), counts
    )
    if book.scope.input_dependent:
        book.note_kept(row, counts[None])


def test_a_row_is_reused_in_the_turn_that_frees_it() -> None:
    """The host frees at once; the device at the next forward, before the new owner's pages."""
    book = book_of_one_rank("layer")
    book.admit(1, 50)
    kept = book.scope.budget(50)
    store(book, 1, kept)
    used = book.pages.num_used
    book.free(1)
    assert book.ledger.held.tolist() == [0] and book.pages.num_used == used
    book.admit(1, 50)  # the same row, in its first chunk
    book.begin_forward([])
    assert book.pages.num_used == 0
    store(book, 1, kept)
    book.hand_over(1, 50)
    assert book.pages.num_used == book.ledger.held[0] == used
    book.free(1)
    book.free(1)  # nothing left to free
    assert book.check_idle() == []


def test_a_flush_gives_everything_back() -> None:
    book = book_of_one_rank("uniform")
    for row in (1, 2):
        book.admit(row, 30)
    store(book, 1, book.scope.budget(30))
    book.clear()
    assert book.live_requests == 0 and book.check_idle() == []


def test_a_spilled_row_keeps_its_charge_until_it_is_free() -> None:
    """What was too much is left out, a step that is under way may go on, and it spills once."""
    book = book_of_one_rank("layer")
    scope, rng = book.scope, np.random.default_rng(3)
    prompt = 200
    assert scope.budget(prompt) < prompt
    seen_before([book], rng)
    book.admission._factor = 0.5
    book.admit(1, prompt)
    pages, book.ledger.capacity = book.ledger.capacity, book.ledger.held.copy()  # nothing is free
    charge, kept = book.ledger.held.copy(), scope.budget(prompt)
    counts = book.recorder.count
    store(book, 1, kept)
    assert book.pages.num_used == 0 and np.all(charge - 2 < book.ledger.pages(1, counts_of(kept)))
    book.grow([1])
    book.pages.kernels.grow(book.pages, torch.tensor([1]), torch.empty((1, 2), dtype=torch.int64))
    assert book.hand_over(1, prompt) and book.hand_over(1, prompt)
    assert (book.charges.spills, book.charges.spilled, book.recorder.count) == (1, {1}, counts + 1)
    book.grow([1])
    book.pages.kernels.grow(book.pages, torch.tensor([1]), torch.empty((1, 2), dtype=torch.int64))
    assert book.pages.num_used == 2 <= charge[0] == book.ledger.held[0]
    book.free(1)
    assert not book.charges.spilled and book.check_idle() == []
    book.ledger.capacity = pages
    book.admit(1, prompt, spilled=True)
    store(book, 1, kept)
    assert not book.hand_over(1, prompt)
    assert (book.charges.spills, book.recorder.count) == (1, counts + 1)
    book.free(1)
    assert book.check_idle() == []


@pytest.mark.parametrize("alone", [True, False])
def test_nothing_spills_where_pages_are_free(alone: bool) -> None:
    """A prompt gets its bound before it is stored, if another like it could still be admitted."""
    book = book_of_one_rank("layer")
    seen_before([book], np.random.default_rng(3))
    book.admission._factor = 0.5
    if not alone:
        book.admit(2, 1)
    before = book.ledger.held.copy()
    book.admit(1, 200)
    asked = book.admission.ask(200)
    reserve = 0 if alone else asked.charge
    for lacking in (1, 0):
        assert np.array_equal(book.ledger.held, before + asked.charge)
        book.ledger.capacity = before + asked.bound + asked.lanes + reserve - lacking
        book.begin_forward([1])
    assert np.array_equal(book.ledger.held, before + asked.bound + asked.lanes)
    store(book, 1, book.scope.budget(200))
    assert not book.hand_over(1, 200) and book.charges.spills == 0


def test_leaks_are_reported() -> None:
    book = book_of_one_rank("layer")
    book.admit(1, 50)
    store(book, 1, 20)
    problems = book.check_idle()
    assert len(problems) == 4 and "leaked" in " ".join(problems)


def test_lanes_close_gaps_with_their_pages() -> None:
    """A stored row keeps its pages, one still in its chunks gets them in the new slot."""
    scope = random_scope(np.random.default_rng(2), "layer", 2, 3)
    plan = Plan.from_shares(np.ones((2, 1, 3)), "one rank")
    book = make_books(plan, scope, np.array([90]), rows=3, slots=4)[0]
    table = book.heads.table
    book.admit(1, 50)
    book.begin_forward([1])
    kept, pool = torch.arange(8), torch.randn((8, 3, 8))
    table.take(1, 0, 0)  # its requests have left; slots count over layers
    book.pages.owned[1, 4] = 0
    for layer in (0, 1):
        book.pages.kernels.store_kept(
            book.pages, 1, 4 * layer, pool, pool, kept, kept.expand(3, -1), torch.full((3,), 8),
            torch.tensor([0, 1, 2, -1]),
        )  # fmt: skip
    book.admit(2, 50)
    assert table.close_gap(1, 0) == (2, 0) and table.head[1, 0].tolist() == [2, 1, -1, -1]
    book.shift_lane(4 + 2, 4 + 0)
    assert table.close_gap(1, 0) is None and table.close_gap(0, 0) is None
    assert book.pages.lens[1].tolist() == [8, 8, 8, 0, 8, 8, 0, 0]
    keys = book.pages.keys[book.pages.page_table[1, 4, 0].long()].flatten(1)
    assert torch.equal(keys[:8], pool[:, 2])
    book.pages.check_integrity()
    book.begin_forward([2])
    assert book.pages.owned[2].tolist() == [1, 1, 1, 0, 1, 1, 0, 0]


def test_a_prompt_cannot_end_without_counts() -> None:
    book = book_of_one_rank("layer")
    book.admit(1, 50)
    with pytest.raises(RuntimeError, match="row 1 ended its prompt without kept counts"):
        book.hand_over(1, 50)
    book.hand_over(2, 50)  # a row that is gone is nobody's business


def test_the_log_tells_sequences_apart() -> None:
    def digest(prompts: list[int]) -> str:
        book = book_of_one_rank("uniform")
        for row, prompt in enumerate(prompts, 1):
            book.admit(row, prompt)
        return book.log.digest

    assert digest([9, 12]) == digest([9, 12])
    assert len({digest([9, 12]), digest([12, 9]), digest([9]), digest([9, 13])}) == 4

# SPDX-License-Identifier: Apache-2.0
"""A prompt is admitted with the owners and pages that it was promised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.placement import Plan
from fairkv_tests.core_cases import QUICK, SCOPES, make_books, random_plan, random_scope, seeds


@settings(QUICK, max_examples=40)
@given(seed=seeds, name=st.sampled_from(SCOPES), ranks=st.sampled_from([1, 2, 4]))
def test_a_pass_gets_what_it_was_promised(seed: int, name: str, ranks: int) -> None:
    """All are asked before the first is admitted; each is charged what it was told, on one rank
    for each head, and a pass that never came leaves nothing behind.
    """
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, 2, ranks, 4)
    scope = random_scope(rng, name, 2, 4, ranks)
    lanes = (plan.shares() > 0).sum(axis=(0, 2))
    books = make_books(plan, scope, lanes * 200, max_pages=2)
    row = 0
    for came in (True, False, True):
        prompts = rng.integers(1, 300, int(rng.integers(1, 4))).tolist()
        told = []
        for book in books:
            before, held = book.router.loads(), book.ledger.held.copy()
            book.admission.begin_pass()
            told.append([])
            for prompt in prompts:
                asked = book.admission.ask(prompt)
                book.admission.promise(asked)
                told[-1].append(asked)
                assert asked.lanes.sum() == 2 * 4
                assert np.all(asked.charge <= book.demand.lone_request(prompt))
            if not came:
                book.admission.begin_pass()
                assert np.array_equal(book.router.loads(), before)
                continue
            for number, (prompt, asked) in enumerate(zip(prompts, told[-1], strict=True)):
                owed = book.ledger.held + asked.charge
                book.admit(row + number, prompt)
                assert np.array_equal(book.owners(row + number), asked.owners)
                assert np.all(book.ledger.held <= owed)
                if scope.input_dependent:
                    assert np.array_equal(book.ledger.held, owed)
            assert np.all(book.ledger.held >= held)
        for asked in zip(*told, strict=True):
            assert len({one.owners.tobytes() for one in asked}) == 1
            assert len({one.lasting(50).tobytes() for one in asked}) == 1
        row += len(prompts) if came else 0
    for book in books:
        book.clear()
        assert not book.router.loads().any() and not book.ledger.held.any()


def test_promised_prompts_come_in_their_order() -> None:
    rng = np.random.default_rng(1)
    plan = Plan.from_shares(np.ones((2, 1, 4)), "one rank")
    book = make_books(plan, random_scope(rng, "layer", 2, 4, 1), np.array([400]), max_pages=2)[0]
    book.admission.promise(book.admission.ask(90))
    with pytest.raises(RuntimeError, match=r"row 3 has a prompt of 91 tokens, .* promised .* 90"):
        book.admit(3, 91)

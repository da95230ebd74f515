# SPDX-License-Identifier: Apache-2.0
"""Admission counts what a request will hold, not what it would have held without compression."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fairkv_sglang.patches.rank
from fairkv_sglang.budgets import BudgetSpec, make_scope, make_scorer
from fairkv_sglang.patches import scheduling
from fairkv_sglang.patches.prefill_budget import FairKVPrefillBudget
from fairkv_sglang.placement import Plan
from fairkv_tests.core_cases import QUICK, SCOPES, make_books, random_plan, random_scope, seeds

SLACK, BUDGET, PROMPT, OUTPUT = 32, 48, 400, 4000


class Pool(SimpleNamespace):
    """SGLang's allocator and prefix cache, empty of prompts."""

    page_size = 1

    def __init__(self, tokens: int = 1 << 20) -> None:
        super().__init__(tokens=tokens)

    def available_size(self) -> int:
        return int(self.tokens)

    def evictable_size(self) -> int:
        return 0

    def supports_mamba(self) -> bool:
        return False


def book_of(slack: int | None, pages: int):
    plan = Plan.from_shares(np.ones((1, 1, 2)), "one rank")
    scope = make_scope("uniform", BudgetSpec(tokens=BUDGET), 1, 2, make_scorer("snapkv"))
    return make_books(plan, scope, np.array([pages]), rows=200, slack=slack)[0]


def asked(book, prompt: int, output: int, running: float = 0.0) -> FairKVPrefillBudget | None:
    """The budget that has said yes to a prompt, or None."""
    pool = Pool()
    budget = FairKVPrefillBudget(pool, pool, book)
    budget.total_offset += running
    fits, _ = budget.check_prefill(
        extend_input_len=prompt,
        total_tokens=prompt + output,
        max_new_tokens=output,
        input_tokens=prompt,
        swa_host_hit_length=0,
        chunk_limit=77,
    )
    return budget if fits else None


def running_output(book, row: int, tokens: float) -> float:
    """What SGLang expects a running request to write, as the hook corrects it."""
    req = SimpleNamespace(kv=SimpleNamespace(holds_kv=True, req_pool_idx=row))
    with mock.patch.object(fairkv_sglang.patches.rank, "_rank", SimpleNamespace(book=book)):
        return scheduling.around_running_output(lambda adder, req: tokens, None, req)


def admitted(slack: int | None, pages: int) -> int:
    """Requests with outputs of 4,000 tokens that are taken one after the other."""
    book = book_of(slack, pages)
    for row in range(1, 200):
        running = sum(running_output(book, other, OUTPUT) for other in book.ledger.rows)
        budget = asked(book, PROMPT, OUTPUT, running)
        if budget is None:
            return row - 1
        budget.reserve(PROMPT, OUTPUT)
        book.admit(row, PROMPT)
    raise AssertionError("no end")


def test_as_many_requests_are_taken_as_fit_for_ever() -> None:
    """48 tokens and a slack of 32 are 5 pages of a head, 48 and 4,000 are 253.

    R-KV in SGLang reserved the old footprint, so its memory stood empty.
    """
    pages = 2 * 5 * 60
    assert admitted(None, pages) == 1
    assert 58 <= admitted(SLACK, pages) <= 60


def test_a_running_request_is_expected_to_write_until_it_is_compressed() -> None:
    book = book_of(SLACK, 1000)
    for row, prompt in ((1, PROMPT), (2, 10)):
        book.admit(row, prompt)
    book.grow([1])
    assert running_output(book, 1, 500.0) == SLACK - 1
    assert running_output(book, 2, 500.0) == BUDGET - 10 + SLACK
    assert running_output(book, 2, 3.0) == 3
    assert running_output(book_of(None, 1000), 1, 500.0) == 500


def test_the_last_chunk_of_a_prompt_brings_no_more_output_than_that() -> None:
    book, pool = book_of(SLACK, 1000), Pool()
    book.admit(1, PROMPT)
    budget = FairKVPrefillBudget(pool, pool, book)
    budget.reserve(100, OUTPUT, is_chunked_continuation=True)
    assert budget.lasting.tolist() == [2 * SLACK // 16]


def test_an_output_may_be_as_long_as_the_pool_lets_it_come_back() -> None:
    """Pages and page tables end none that is compressed; without they end it early."""
    division = SimpleNamespace(pool_tokens=20_000, max_head_tokens=200)
    found = []
    for slack in (None, SLACK):
        book = book_of(slack, 40)
        rank = SimpleNamespace(book=book, scope=book.scope, division=division)
        with mock.patch.object(fairkv_sglang.patches.rank, "_rank", rank):
            longest = scheduling.around_max_new_tokens(None, Pool(), PROMPT, 1 << 30)
        found.append(longest)
    assert found == [200 - BUDGET, 20_000 - PROMPT - 1]


@pytest.mark.parametrize("name", SCOPES)
@settings(QUICK, max_examples=60)
@given(
    seed=seeds,
    ranks=st.sampled_from([1, 2, 4]),
    pages=st.integers(6, 30),
    prompt=st.integers(1, 500),
)
def test_whoever_is_taken_fits_alone_and_can_come_back(
    name: str, seed: int, ranks: int, pages: int, prompt: int
) -> None:
    """With the most that it can hold at any time, before and after a retraction."""
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, 2, ranks, 4)
    scope = random_scope(rng, name, 2, 4, ranks)
    lanes = (plan.shares() > 0).sum(axis=(0, 2))
    book = make_books(plan, scope, lanes * pages, max_pages=2, slack=SLACK)[0]
    division = SimpleNamespace(pool_tokens=640, max_head_tokens=320)
    rank = SimpleNamespace(book=book, scope=scope, division=division)
    with mock.patch.object(fairkv_sglang.patches.rank, "_rank", rank):
        output = scheduling.around_max_new_tokens(None, Pool(640), prompt, 1 << 30)
    assume(output)
    assert output is not None
    for so_far in range(0, output + 1, 7):
        assert asked(book, prompt + so_far, output - so_far) is not None, so_far
    bound = book.outputs.rule.bound(prompt)
    if bound is None:
        return
    book.admit(1, prompt)
    owners, most = book.owners(1), np.full((2, 4), prompt)
    if bound.whole is None:
        by_rank = book.demand.with_owners(prompt, owners)
        by_rank = by_rank + np.bincount(owners.ravel(), minlength=ranks) * (SLACK // 16)
    else:
        most = np.minimum(bound.most(most), prompt + output)
        by_rank = book.ledger.pages(1, most)
        assert most.max() <= 320 + 16
    if output < bound.due:
        by_rank = book.demand.with_owners(prompt, owners)
        by_rank = by_rank + np.bincount(owners.ravel(), minlength=ranks) * -(-output // 16)
    assert np.all(by_rank <= book.ledger.capacity)

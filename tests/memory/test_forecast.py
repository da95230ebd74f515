# SPDX-License-Identifier: Apache-2.0
"""What a prompt is charged: what the last ones let expect, never more than it could need."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fairkv_sglang.budgets import BudgetSpec, make_scope, make_scorer
from fairkv_sglang.memory.forecast import DEVIATIONS, LEAST_SEEN, forecast_pages
from fairkv_sglang.placement import Plan
from fairkv_tests.core_cases import (
    QUICK,
    make_books,
    pages_by_rank,
    random_owners,
    random_plan,
    random_scope,
    seeds,
    seen_before,
)

INPUT_DEPENDENT = ("layer", "rank", "threshold", "model")


@settings(QUICK, max_examples=80)
@given(
    seed=seeds, name=st.sampled_from(INPUT_DEPENDENT), ranks=st.sampled_from([1, 2, 4]),
    prompt=st.integers(5, 400), seen=st.integers(1, 20),
)  # fmt: skip
def test_mean_and_deviations_of_the_recorded_prompts(
    seed: int, name: str, ranks: int, prompt: int, seen: int
) -> None:
    """Against the formula in floats, one prompt, head and rank at a time."""
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, 2, ranks, 4)
    scope, owners = random_scope(rng, name, 2, 4, ranks), random_owners(rng, plan)
    kept = rng.integers(scope.window, 300, (seen, 2, 4))
    taken = np.zeros((seen, ranks))
    for number in range(seen):
        tokens = np.zeros((2, 4), dtype=np.int64)
        for layer in range(2):
            shared = slice(None) if name == "model" else layer
            total = int(scope.expected(prompt)[shared].sum())
            for head in range(4):
                part = int(kept[number, layer, head]) * total / int(kept[number, shared].sum())
                most = int(scope.per_head_bound(prompt)[layer, head])
                tokens[layer, head] = min(np.ceil(part - 1e-9), most)
        taken[number] = pages_by_rank(tokens, owners, ranks)
    found = forecast_pages(scope, kept, prompt, owners, ranks)
    wanted = taken.mean(axis=0) + DEVIATIONS * taken.std(axis=0)
    assert np.all(found >= wanted - 1) and np.all(found <= np.ceil(wanted) + 1)
    assert np.all(found >= np.floor(taken.mean(axis=0)))


@settings(QUICK, max_examples=60)
@given(
    seed=seeds, name=st.sampled_from(INPUT_DEPENDENT), ranks=st.sampled_from([1, 2, 4]),
    prompt=st.integers(1, 400), factor=st.sampled_from([1.0, 0.3]),
)  # fmt: skip
def test_a_charge_is_at_most_the_bound(
    seed: int, name: str, ranks: int, prompt: int, factor: float
) -> None:
    """The same on all ranks; who has spilled, and who comes before there is much to go by, pay the
    bound; a forecast says nothing of a prompt that keeps everything.
    """
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, 2, ranks, 4)
    scope = random_scope(rng, name, 2, 4, ranks)
    assume(scope.budget(200) < 200)
    capacity = (plan.shares() > 0).sum(axis=(0, 2)) * 400
    books = make_books(plan, scope, capacity, forecast_factor=factor, max_pages=2)

    def asked(certain: bool = False) -> tuple[np.ndarray, np.ndarray]:
        for book in books:
            book.admission.certain = certain
        found = [book.admission.ask(prompt) for book in books]
        assert len({(one.limit.tobytes(), one.charge.tobytes()) for one in found}) == 1
        return found[0].limit, found[0].bound

    assert np.array_equal(*asked())
    whole = np.full((2, 4), 60)
    for book in books:
        for _ in range(2 * LEAST_SEEN):
            book.recorder.add(whole, 60)  # everything was kept: that tells nothing
    assert np.array_equal(*asked())
    seen_before(books, rng)
    limit, bound = asked()
    assert np.all(limit <= bound) and np.all(limit >= 0)
    assert np.array_equal(*asked(certain=True))
    if scope.budget(prompt) >= prompt:
        assert np.array_equal(limit, bound)


def test_few_prompts_take_more_than_a_forecast() -> None:
    """New prompts of the same traffic, heads with habits: far below the bound, rarely wrong."""
    rng, ranks, length = np.random.default_rng(4), 4, 400
    plan = random_plan(rng, 8, ranks, 8)
    scope = make_scope("layer", BudgetSpec(ratio=0.25), 8, 8, make_scorer("snapkv"))
    habits = rng.normal(0, 0.5, (8, 8))

    def kept() -> np.ndarray:
        shares = np.exp(habits + rng.normal(0, 0.3, (8, 8)))
        return np.rint(800 * shares / shares.sum(axis=1, keepdims=True)).astype(np.int64)

    seen = np.stack([kept() for _ in range(40)])
    book = make_books(plan, scope, np.full(ranks, 10**6), max_pages=2)[0]
    wrong, charged = 0, []
    for _ in range(200):
        owners = random_owners(rng, plan)
        limit = forecast_pages(scope, seen, length, owners, ranks)
        wrong += bool(np.any(pages_by_rank(kept(), owners, ranks) > limit))
        charged.append(limit.sum() / book.demand.with_owners(length, owners).sum())
    assert wrong <= 6 and np.mean(charged) < 0.7, (wrong, np.mean(charged))


def test_a_static_scope_is_charged_what_it_takes() -> None:
    plan = Plan.from_shares(np.ones((1, 1, 2)), "one rank")
    scope = make_scope("uniform", BudgetSpec(ratio=0.25), 1, 2, make_scorer("snapkv"))
    book = make_books(plan, scope, np.array([900]), max_pages=2)[0]
    for row in range(1, 2 + LEAST_SEEN):
        book.admit(row, 400)
        book.free(row)
    asked = book.admission.ask(400)
    assert np.array_equal(asked.limit, asked.bound) and book.charges.spills == 0

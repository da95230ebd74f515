# SPDX-License-Identifier: Apache-2.0
"""Admission: what is let in fits, also when it comes back after a retraction; nothing waits for
ever.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fairkv_sglang.patches.rank
from fairkv_sglang.budgets import BudgetSpec, make_scope, make_scorer
from fairkv_sglang.kernels.layout import ERROR_NO_FREE_PAGE
from fairkv_sglang.memory.sizing import LEAST_PAGES
from fairkv_sglang.patches import passes, scheduling
from fairkv_sglang.patches.prefill_budget import FairKVPrefillBudget
from fairkv_sglang.placement import Plan
from fairkv_tests.core_cases import QUICK, SCOPES, make_books, random_plan, random_scope, seeds

MAX_HEAD_TOKENS = 600


class Pool:
    """SGLang's allocator and prefix cache, empty of prompts."""

    def __init__(self, tokens: int, page_size: int) -> None:
        self.tokens, self.page_size = tokens, page_size

    def available_size(self) -> int:
        return self.tokens

    def evictable_size(self) -> int:
        return 0

    def supports_mamba(self) -> bool:
        return False


def server(seed: int, name: str, ranks: int, pages: int, page_size: int = 1, pool: int = 640):
    """The state of a rank, its pool, and the random generator."""
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, 2, ranks, 4)
    scope = random_scope(rng, name, 2, 4, ranks)
    lanes = (plan.shares() > 0).sum(axis=(0, 2))
    book = make_books(plan, scope, lanes * pages, max_pages=2)[0]
    division = SimpleNamespace(pool_tokens=pool, max_head_tokens=MAX_HEAD_TOKENS)
    rank = SimpleNamespace(book=book, scope=scope, division=division, repeats=None)
    return rank, Pool(pool, page_size), rng


def clip(rank, pool: Pool, prompt: int, wanted: int) -> int | None:
    with mock.patch.object(fairkv_sglang.patches.rank, "_rank", rank):
        return scheduling.around_max_new_tokens(None, pool, prompt, wanted, token_capacity=0)


def fits(budget: FairKVPrefillBudget, prompt: int, output: int) -> bool:
    ok, limit = budget.check_prefill(
        extend_input_len=prompt,
        total_tokens=prompt + output,
        max_new_tokens=output,
        input_tokens=prompt,
        swa_host_hit_length=0,
        chunk_limit=77,
    )
    assert limit == (77 if ok else None)
    return ok and budget.has_capacity()


@pytest.mark.parametrize("name", SCOPES)
@settings(QUICK, max_examples=60)
@given(
    seed=seeds,
    ranks=st.sampled_from([1, 2, 4]),
    pages=st.integers(LEAST_PAGES, 45),
    page_size=st.sampled_from([1, 16]),
    prompt=st.integers(1, 620),
    wanted=st.sampled_from([1, 30, 1 << 30]),
)
def test_whoever_is_taken_can_always_come_back(
    name: str, seed: int, ranks: int, pages: int, page_size: int, prompt: int, wanted: int
) -> None:
    rank, pool, _ = server(seed, name, ranks, pages, page_size)
    output = clip(rank, pool, prompt, wanted)
    if output is None:
        return
    assert 0 <= output <= wanted
    for so_far in range(output + 1):
        budget = FairKVPrefillBudget(pool, pool, rank.book)
        assert fits(budget, prompt + so_far, output - so_far), so_far
        longest_head = int(rank.scope.per_head_bound(prompt + so_far).max())
        assert longest_head + output - so_far <= MAX_HEAD_TOKENS + 16  # a page to spare in tables


@pytest.mark.parametrize("pages", range(8, 20))
def test_bounds_that_rise_faster_than_the_prompt(pages: int) -> None:
    """One head of eight on each rank: near 130 tokens its bound rises by two for each token."""
    plan = Plan.from_shares(np.eye(8)[None], "one head each")
    spec = BudgetSpec(ratio=0.25)
    scope = make_scope("layer", spec, 1, 8, make_scorer("snapkv"), floor_alpha=0.0)
    book = make_books(plan, scope, np.full(8, pages), max_pages=2)[0]
    division = SimpleNamespace(pool_tokens=640, max_head_tokens=MAX_HEAD_TOKENS)
    rank, pool = SimpleNamespace(book=book, scope=scope, division=division), Pool(640, 1)
    output = clip(rank, pool, 130, 1 << 30)
    assert output is not None and output >= 16
    for so_far in range(output + 1):
        budget = FairKVPrefillBudget(pool, pool, book)
        assert fits(budget, 130 + so_far, output - so_far), so_far


@pytest.mark.parametrize("name", SCOPES)
@settings(QUICK, max_examples=60)
@given(seed=seeds, ranks=st.sampled_from([1, 2, 4]), prompt=st.integers(1, 300))
def test_alone_nobody_runs_out_of_pages(name: str, seed: int, ranks: int, prompt: int) -> None:
    """From admission to the last token, with the most pages that its scores could take."""
    rank, pool, _ = server(seed, name, ranks, 14)
    output = clip(rank, pool, prompt, 1 << 30)
    assume(output)
    book = rank.book
    book.admit(1, prompt)
    assert np.all(book.ledger.held <= book.ledger.capacity)
    owners = book.owners(1)
    lanes = np.bincount(owners.ravel(), minlength=ranks)
    bound = book.demand.with_owners(prompt, owners)
    assert np.all(bound + lanes * -(-output // 16) <= book.ledger.capacity)


@settings(QUICK, max_examples=60)
@given(seed=seeds, name=st.sampled_from(SCOPES), ranks=st.sampled_from([1, 2, 4]))
def test_one_pass_does_not_promise_more_than_there_is(seed: int, name: str, ranks: int) -> None:
    rank, pool, rng = server(seed, name, ranks, 60, pool=100_000)
    book = rank.book
    row, taken = 0, 0
    for _ in range(3):  # passes
        budget = FairKVPrefillBudget(pool, pool, book)
        admitted = []
        for _ in range(4):
            prompt, output = int(rng.integers(1, 300)), int(rng.integers(0, 60))
            if not fits(budget, prompt, output):
                continue
            budget.reserve(prompt, output)
            admitted.append(prompt)
        for prompt in admitted:
            row, taken = row + 1, taken + 1
            book.admit(row, prompt)
        assert np.all(book.ledger.free >= 0)
    assert taken > 0


def test_a_chunk_of_a_known_prompt_is_not_charged_again() -> None:
    rank, pool, _ = server(1, "uniform", 2, 60)
    budget = FairKVPrefillBudget(pool, pool, rank.book)
    assert fits(budget, 100, 10)
    budget.reserve(64, 0)
    promised = budget.promised.copy()
    assert promised.any() and budget.current_offset == 65
    budget.reserve(36, 10, is_chunked_continuation=True)
    assert np.array_equal(budget.promised, promised) and budget.current_offset == 102


def test_the_room_of_a_bound_is_that_of_outputs_to_come() -> None:
    """What a prompt may take for two passes is not set aside on top of what is written later."""
    plan = Plan.from_shares(np.eye(8)[None], "one head each")
    scope = make_scope("layer", BudgetSpec(ratio=0.25), 1, 8, make_scorer("snapkv"))
    book = make_books(plan, scope, np.full(8, 35), max_pages=4)[0]
    pool = Pool(10_000, 1)
    book.admit(1, 400)
    book.note_kept(1, torch.full((1, 8), 100))
    book.hand_over(1, 400)
    assert book.ledger.held.tolist() == [7] * 8
    assert book.admission.ask(400).charge.tolist() == [26] * 8

    def admitted(output: int) -> bool:
        budget = FairKVPrefillBudget(pool, pool, book)
        budget.total_offset += 160  # what the running request is expected to write: 10 pages
        return fits(budget, 400, output)

    assert admitted(160)  # 26 of the 28 free ones at first; 7 + 10 beside 10 later
    assert not admitted(161 + 16)
    book.ledger.capacity = book.ledger.capacity - 6
    assert not admitted(1)  # its bound does not fit


def test_what_lasts_is_expected_by_the_last_prompts() -> None:
    plan = Plan.from_shares(np.eye(8)[None], "one head each")
    scope = make_scope("layer", BudgetSpec(ratio=0.25), 1, 8, make_scorer("snapkv"))
    book = make_books(plan, scope, np.full(8, 400), max_pages=9)[0]
    assert book.admission.ask(400).lasting(0).tolist() == [7] * 8
    for row in range(1, 5):
        book.admit(row, 400)
        book.note_kept(row, torch.tensor([[240, *[80] * 7]]))
        book.hand_over(row, 400)
    assert book.admission.ask(400).lasting(0).tolist() == [15, *[5] * 7]
    assert book.admission.ask(800).lasting(17).tolist() == [32, *[12] * 7]


def test_expected_growth_of_running_requests_is_set_aside() -> None:
    rank, pool, _ = server(1, "uniform", 2, 20)
    rank.book.admit(1, 20)
    budget = FairKVPrefillBudget(pool, pool, rank.book)
    assert fits(budget, 16, 16)
    budget.total_offset += 16 * 40  # SGLang's PrefillAdder adds what they are to decode
    assert not fits(budget, 16, 16)


def test_a_pass_with_running_requests_needs_their_pages_too() -> None:
    rank, pool, _ = server(3, "uniform", 1, 30)
    book = rank.book
    book.admit(1, 40)
    kept = int(rank.scope.expected(40)[0, 0])
    for _ in range(-kept % 16):
        book.grow([1])
    assert book.ledger.growth([1])[0] == 8
    assert FairKVPrefillBudget(pool, pool, book).promised.tolist() == [0]
    mixed = FairKVPrefillBudget(pool, pool, book, num_mixed_decode_tokens=1)
    assert mixed.promised.tolist() == [8] and mixed.available_chunk_tokens(64) == 64
    book.ledger.capacity = book.ledger.held + 7
    assert not fits(FairKVPrefillBudget(pool, pool, book, num_mixed_decode_tokens=1), 1, 0)


class Scheduler(SimpleNamespace):
    """What the hooks on SGLang's scheduler read and set."""

    def __init__(self, running: list[SimpleNamespace], chunked: bool = False) -> None:
        batch = SimpleNamespace(reqs=running, batch_is_full=True)
        super().__init__(running_batch=batch, is_mixed_chunk=True, waiting_queue=[])
        self.chunked_req = object() if chunked else None
        self._add_request_to_queue = self.waiting_queue.append

    def look(self, rank, original) -> object:
        """A search for new prompts through the hook."""
        with mock.patch.object(fairkv_sglang.patches.rank, "_rank", rank):
            return scheduling.around_new_prefill(original, self, self.running_batch)


def running(row: int, finished: bool = False) -> SimpleNamespace:
    kv = SimpleNamespace(req_pool_idx=row, holds_kv=not finished)
    return SimpleNamespace(kv=kv, finished=lambda: finished)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_chunk_does_not_share_its_pass_with_requests_that_get_no_pages(chunked: bool) -> None:
    """Or the next step would be a decode step: it retracts down to one request, and aborts that."""
    rank, _, _ = server(3, "uniform", 1, 30)
    book = rank.book
    book.admit(1, 40)
    while not book.ledger.growth([1]).all():
        book.grow([1])
    scheduler, mixed = Scheduler([running(1)], chunked), []

    def original(scheduler: Scheduler, batch: object) -> SimpleNamespace:
        mixed.append(scheduler.is_mixed_chunk)
        return SimpleNamespace(batch_to_run=None)

    def deferred() -> bool:
        with mock.patch.object(fairkv_sglang.patches.rank, "_rank", rank):
            return scheduling.around_defer_prefill(lambda scheduler: True, scheduler)

    for lacking in (0, 1):
        book.ledger.capacity = book.ledger.held + book.ledger.growth([1]) - lacking
        scheduler.look(rank, original)
        assert scheduler.is_mixed_chunk
        assert deferred() == (not (chunked and lacking))
    assert mixed == [True, not chunked]


@pytest.mark.parametrize(("forgets", "admitted"), [(True, False), (True, True), (False, False)])
def test_a_request_preempted_in_vain_waits_again(
    monkeypatch: pytest.MonkeyPatch, forgets: bool, admitted: bool
) -> None:
    """Where SGLang forgets it: not if it was admitted for whom it was preempted."""
    monkeypatch.setattr(scheduling, "forgets_preempted", lambda: forgets)
    rank, _, _ = server(3, "uniform", 1, 30)
    low, other, ended = running(1), running(2), running(3, finished=True)
    scheduler = Scheduler([low, ended, other])

    def original(scheduler: Scheduler, batch: SimpleNamespace) -> SimpleNamespace:
        low.kv.holds_kv = False
        batch.reqs = [ended, other]
        return SimpleNamespace(batch_to_run="a batch" if admitted else None)

    scheduler.look(rank, original)
    assert scheduler.waiting_queue == ([low] if forgets and not admitted else [])


class Running(SimpleNamespace):
    """SGLang's running batch: what retraction does to it."""

    def release_req(self, index: int, others: int) -> None:
        """The request loses its row."""
        assert others == 0, "cached prefixes would be evicted"
        self.released.append(self.reqs[index])

    def filter_batch(self, keep_indices: list[int]) -> None:
        """The others stay."""
        self.reqs = [self.reqs[i] for i in keep_indices]


@pytest.mark.parametrize("mixes", [False, True])
def test_a_spilled_request_waits_from_the_next_pass_on(mixes: bool) -> None:
    """It is gone before the search, which may decode the rest, and waits behind it."""
    rank, _, _ = server(3, "layer", 1, 30)
    spilled, other, ended = running(1), running(2), running(1, finished=True)
    scheduler = Scheduler([])
    scheduler.running_batch = batch = Running(
        reqs=[ended, spilled, other], released=[], batch_is_full=True
    )
    after = SimpleNamespace(reqs=[], batch_is_full=True) if mixes else batch

    def original(scheduler: Scheduler, batch: Running) -> SimpleNamespace:
        assert batch.reqs == [ended, other] and batch.released == [spilled]
        assert scheduler.waiting_queue == []
        rank.book.charges.spilled.clear()  # as its row is free
        return SimpleNamespace(batch_to_run="a batch" if mixes else None, running_batch=after)

    def deferred() -> bool:
        with mock.patch.object(fairkv_sglang.patches.rank, "_rank", rank):
            return scheduling.around_defer_prefill(lambda scheduler: True, scheduler)

    assert deferred()
    rank.book.charges.spilled.add(1)
    assert not deferred()  # or a decode step would go on with it
    scheduler.look(rank, original)
    assert scheduler.waiting_queue == [spilled] and not after.batch_is_full


def test_slots_that_came_back_are_looked_at() -> None:
    rank, _, _ = server(3, "uniform", 1, 30)
    plan = SimpleNamespace(batch_to_run=None)
    scheduler = Scheduler([])
    assert scheduler.look(rank, lambda *_: plan) is plan and scheduler.running_batch.batch_is_full
    rank.book.hand_over(1, 50)
    scheduler.look(rank, lambda *_: plan)
    assert not scheduler.running_batch.batch_is_full


def test_a_prompt_longer_than_the_pool_is_rejected() -> None:
    rank, pool, _ = server(1, "uniform", 1, 200, page_size=16)
    assert clip(rank, pool, 640 - 16, 5) is None
    assert clip(rank, pool, 640 - 17, 5) == 1


def test_decode_capacity_asks_the_fullest_rank() -> None:
    rank, _, _ = server(4, "uniform", 2, 30)
    book = rank.book
    book.admit(1, 16)
    while not book.ledger.growth([1]).all():
        book.grow([1])
    requests = [SimpleNamespace(kv=SimpleNamespace(req_pool_idx=1))]
    with mock.patch.object(fairkv_sglang.patches.rank, "_rank", rank):
        need = book.ledger.growth([1])
        book.ledger.capacity = book.ledger.held + need
        assert scheduling.around_check_decode_capacity(None, None, requests=requests)
        book.ledger.capacity = book.ledger.held + need - np.array([0, 1])
        assert not scheduling.around_check_decode_capacity(None, None, requests=requests)
        assert scheduling.around_check_decode_capacity(None, None, requests=[])
        with pytest.raises(RuntimeError, match="without naming the requests"):
            scheduling.around_check_decode_capacity(None, None)


def test_mixed_batches_reserve_the_pages_of_running_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang tells the hook how many rows decode in the pass, and the budget must hear of it."""
    from fairkv_sglang.patches import prefill_budget

    made: list[int] = []

    class Recorder:
        def __init__(self, allocator: object, cache: object, book: object, mixed: int = 0) -> None:
            made.append(mixed)

    class Rank:
        book = object()

    monkeypatch.setattr(prefill_budget, "FairKVPrefillBudget", Recorder)
    monkeypatch.setattr(scheduling, "this_rank", Rank)
    scheduling.around_create_prefill_budget(None, None, None, num_mixed_decode_tokens=5)
    assert made == [5]


def test_a_device_error_stops_the_rank_before_its_pass_gives_out_a_token() -> None:
    rank, _, _ = server(1, "uniform", 1, 40)
    book = rank.book
    results = [SimpleNamespace(), SimpleNamespace(), SimpleNamespace()]
    with mock.patch.object(fairkv_sglang.patches.rank, "_rank", rank):
        assert passes.after_forward_batch(results[0], None) is results[0]
        book.pages.error.bitwise_or_(ERROR_NO_FREE_PAGE)  # as a kernel of the second pass
        passes.after_forward_batch(results[1], None)
        # SGLang is a pass ahead: the first result is good, and stays so.
        passes.before_process_result(None, None, results[0])
        with pytest.raises(RuntimeError, match="no free head page"):
            passes.before_process_result(None, None, results[1])
        passes.before_process_result(None, None, results[2])  # nothing ran
    assert any("no free head page" in problem for problem in book.check_idle())

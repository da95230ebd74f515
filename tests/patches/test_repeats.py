# SPDX-License-Identifier: Apache-2.0
"""Who repeats its prompt, when, and what becomes of the request meanwhile."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

import fairkv_sglang.patches.rank
from fairkv_sglang.attention.forward_spans import CONTEXT
from fairkv_sglang.budgets import BudgetSpec, make_scope
from fairkv_sglang.budgets.repeats import Wording
from fairkv_sglang.budgets.scorers.kvzip import KVzip
from fairkv_sglang.memory.contexts import Contexts
from fairkv_sglang.patches import repeating
from fairkv_sglang.patches import repeats as patches
from fairkv_sglang.patches.repeating import Repeats, repeat_of
from fairkv_sglang.patches.request_options import keep_of

WORDING = Wording(first=(1, 2), later=(3,), suffix=(4, 5))
WINDOW, CHUNK = 8, 50


def request(length: int, first: int = 100, **parameters: Any) -> SimpleNamespace:
    return SimpleNamespace(
        origin_input_ids=array("q", range(first, first + length)), output_ids=array("q"),
        full_untruncated_fill_ids=array("q"),
        extra_key=None, cache_salt=None, rid="r", to_finish=None, is_retracted=False,
        return_logprob=True, logprob_start_len=3, retraction_count=0, skip_radix_cache_insert=False,
        kv=SimpleNamespace(holds_kv=True, cache_protected_len=0),
        sampling_params=SimpleNamespace(custom_params=None, **parameters),
    )  # fmt: skip


@pytest.fixture
def repeats() -> Repeats:
    """A quarter is kept."""
    scorer = KVzip(window=WINDOW, chunk=CHUNK)
    scope = make_scope("layer", BudgetSpec(ratio=0.25), 2, 2, scorer)
    return Repeats(scorer, scope, keep_of, WORDING, Contexts())


class Running(SimpleNamespace):
    """SGLang's running batch."""

    def release_req(self, index: int, others: int) -> None:
        assert others == 0
        self.reqs[index].kv.holds_kv = False
        self.reqs[index].retraction_count += 1
        self.released.append(self.reqs[index])

    def filter_batch(self, keep_indices: list[int]) -> None:
        self.reqs = [self.reqs[i] for i in keep_indices]


def run(repeats: Repeats, req: Any, chunked: Any = None) -> list[Any]:
    """A pass of one request, and who is taken out after it."""
    repeats.begin_pass(None)
    repeats.decide(req)
    repeats.launched(SimpleNamespace(batch_to_run=SimpleNamespace(reqs=[req])), chunked)
    running = Running(reqs=[request(9), req], released=[], tree_cache=None)
    with mock.patch.object(repeating, "keep_prefix") as kept:
        taken = repeats.take_out(running)
    assert running.released == taken and len(running.reqs) == 2 - len(taken)
    assert kept.call_count == len(taken)
    req.kv.holds_kv = True
    return taken


def test_a_request_repeats_all_chunks_and_then_is_itself(repeats: Repeats) -> None:
    req = request(120)
    for start in (0, 50, 100):
        assert run(repeats, req) == [req] and req.is_retracted and not repeats.pending
        repeat = repeat_of(req)
        assert repeat is not None and repeat.start == start
        assert not req.return_logprob and req.logprob_start_len == -1
        assert req.retraction_count == 0
    assert run(repeats, req) == []
    assert repeat_of(req) is None and not repeats.waits(req)
    assert req.return_logprob and req.logprob_start_len == 3
    assert getattr(req, CONTEXT).complete


def test_a_chunk_of_sglangs_is_not_the_end_of_a_pass(repeats: Repeats) -> None:
    req = request(40)
    assert run(repeats, req, chunked=req) == [] and not req.is_retracted
    assert not getattr(req, CONTEXT).complete
    repeats.begin_pass(req)  # it goes on
    twin = request(40)
    repeats.decide(twin)
    assert repeats.waits(twin) and repeat_of(twin) is None


def test_of_the_same_prompts_one_is_repeated(repeats: Repeats) -> None:
    one, two, other = request(40), request(40), request(40, first=7)
    repeats.begin_pass(None)
    for req in (one, two, other):
        repeats.decide(req)
    assert [repeats.waits(req) for req in (one, two, other)] == [False, True, False]
    assert [repeat_of(req) is None for req in (one, two, other)] == [False, True, False]
    run(repeats, two)  # the first one has been aborted
    late = request(40)
    repeats.decide(late)
    assert getattr(late, CONTEXT) is getattr(one, CONTEXT)
    assert repeat_of(late) is None and not repeats.waits(late)
    assert (repeats.contexts.passes, repeats.contexts.reused) == (1, 1)


def test_prompts_that_keep_everything_are_not_repeated(repeats: Repeats) -> None:
    whole = request(40)
    whole.sampling_params.custom_params = {"fairkv": '{"compress": false}'}
    assert repeats.needed(request(40), 40) and not repeats.needed(whole, 40)
    assert not repeats.needed(request(40), WINDOW)
    req = request(WINDOW)
    repeats.decide(req)
    assert getattr(req, CONTEXT) is None and not repeats.waits(req)


def test_a_retracted_request_is_repeated_when_its_output_leaves_the_window(
    repeats: Repeats,
) -> None:
    req = request(40)
    run(repeats, req)
    context = getattr(req, CONTEXT)
    for output in (1, WINDOW):
        req.output_ids = array("q", range(output))
        repeats.decide(req)
        assert getattr(req, CONTEXT) is context and repeat_of(req) is None
    req.output_ids.append(0)
    repeats.begin_pass(None)
    repeats.decide(req)
    repeat = repeat_of(req)
    assert repeat is not None and len(repeat.context.tokens) == 40 + WINDOW + 1
    assert repeat.tokens[-1] == 0


def test_who_was_aborted_in_a_pass_is_gone(repeats: Repeats) -> None:
    """The others wait in front, in their order."""
    kept, aborted, behind = request(40), request(40, first=7), request(9)
    aborted.to_finish = SimpleNamespace(to_json=lambda: {"type": "abort"})
    scheduler = SimpleNamespace(waiting_queue=[behind], aborted=[])
    scheduler.abort_request = scheduler.aborted.append
    repeats.put_back(scheduler, [kept, aborted])
    assert [id(x) for x in scheduler.waiting_queue] == list(map(id, [kept, aborted, behind]))
    assert [x.finished_reason for x in scheduler.aborted] == [{"type": "abort"}]


@pytest.mark.parametrize("room", range(0, 260, 7))
def test_the_longest_prompt_that_can_be_repeated(repeats: Repeats, room: int) -> None:
    def fits(length: int) -> bool:
        return length + WORDING.longest + min(length, CHUNK) <= room

    most = repeats.most_tokens(room)
    assert most < 1 or fits(most)
    assert not fits(max(most, 0) + 1)


def test_requests_are_clipped_or_refused(repeats: Repeats) -> None:
    rank = SimpleNamespace(repeats=repeats, division=SimpleNamespace(pool_tokens=500))
    allocator = SimpleNamespace(page_size=16)
    scheduler = SimpleNamespace(max_req_len=300, token_to_kv_pool_allocator=allocator)
    most = repeats.most_tokens(299)
    said: list[str] = []

    def arrives(length: int, output: int) -> Any:
        req = request(length, max_new_tokens=output, min_new_tokens=output)
        req.set_finish_with_abort = said.append
        with mock.patch.object(fairkv_sglang.patches.rank, "_rank", rank):
            patches.after_init_max_new_tokens(None, scheduler, req)
        return req.sampling_params.max_new_tokens, req.sampling_params.min_new_tokens

    assert arrives(100, 20) == (20, 20)
    assert arrives(100, 1000) == (most - 100, most - 100)
    assert arrives(most - 1, 5) == (1, 1)
    assert not said
    arrives(most, 5)
    assert f"this one has {most}, and this server has room for {most - 1} at most" in said[0]
    rank.repeats = None
    assert arrives(4000, 1000) == (1000, 1000) and len(said) == 1


def test_what_repeats_a_prompt_is_among_its_tokens_and_not_taken_from_the_cache(
    repeats: Repeats,
) -> None:
    req, seen = request(40), []
    cache = SimpleNamespace(repeated=0)

    def original(req: Any, tree_cache: Any = None) -> None:
        assert not req.full_untruncated_fill_ids
        req.full_untruncated_fill_ids = req.origin_input_ids + req.output_ids
        seen.append((len(req.full_untruncated_fill_ids), cache.repeated))

    rank = SimpleNamespace(repeats=repeats)
    with mock.patch.object(fairkv_sglang.patches.rank, "_rank", rank):
        repeats.begin_pass(None)
        patches.around_init_next_round(original, req, cache)
        first = repeat_of(req)
        patches.around_init_next_round(original, req)  # its next chunk
    assert first is not None and repeat_of(req) is first
    behind = 4 + 40
    assert seen == [(40 + behind, behind), (40 + behind, 0)]
    assert (len(req.origin_input_ids), cache.repeated) == (40, 0)


def test_who_only_repeats_is_not_streamed(repeats: Repeats) -> None:
    req, other = request(40), request(9)
    repeats.decide(req)
    assert patches.before_stream_output(None, [other], False) is None
    found = patches.before_stream_output(None, [req, other], False, skip_req=req)
    assert found is not None
    (_, reqs, _), named = found
    assert len(reqs) == 1 and reqs[0] is other and named == {"skip_req": req}

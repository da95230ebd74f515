# SPDX-License-Identifier: Apache-2.0
"""Options of a request on their way through SGLang: what is sent to the ranks, and what they say of
a prompt that can never fit.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.sampling.sampling_params import SamplingParams

import fairkv_sglang.patches.rank
from fairkv_sglang.budgets import AS_SERVER, BudgetSpec, Keep, make_scope, make_scorer
from fairkv_sglang.config import RESOLVED_VARIABLE, FairKVConfig
from fairkv_sglang.patches import request_options, scheduling
from fairkv_sglang.patches.requests import after_create_tokenized
from fairkv_sglang.placement import Plan
from fairkv_tests.core_cases import (
    QUICK,
    SCOPES,
    make_books,
    random_keep,
    random_plan,
    random_scope,
    seeds,
)


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent's environment, a scorer with a window of 16."""
    config = FairKVConfig(enabled=True, window=16)
    monkeypatch.setenv(RESOLVED_VARIABLE, config.to_json())


def send(custom: Any, tokens: int = 50, **obj: Any) -> Any:
    """Custom parameters as they leave for the ranks."""
    sampling = SamplingParams(custom_params=custom)
    sampling.normalize(None)
    result = SimpleNamespace(sampling_params=sampling, input_ids=list(range(tokens)))
    request = SimpleNamespace(**{"session_params": None, "input_embeds": None, **obj})
    assert after_create_tokenized(result, None, request) is None
    return result.sampling_params.custom_params


@pytest.mark.usefixtures("resolved")
def test_options_reach_a_rank() -> None:
    given = {"fairkv": {"budget": 17, "protect": [[3, 9]]}, "thinking_budget": 5}
    sent = send(given)
    assert sent["thinking_budget"] == 5 and isinstance(sent["fairkv"], str)
    assert given["fairkv"] == {"budget": 17, "protect": [[3, 9]]}  # another request may share it
    request = SimpleNamespace(sampling_params=SimpleNamespace(custom_params=sent))
    assert request_options.keep_of(request) == Keep(BudgetSpec(tokens=17), ((3, 9),))
    for nothing in (None, {}, {"fairkv": None}, {"thinking_budget": 5}):
        request.sampling_params.custom_params = send(nothing)
        assert request_options.keep_of(request) == AS_SERVER


@pytest.mark.usefixtures("resolved")
@pytest.mark.parametrize(
    ("custom", "words"),
    [
        ({"fairkv": {"budget": 16}}, r"^fairkv\.budget: 16 tokens are too few .* at least 17\.$"),
        ({"fairkv": {"protect": [[3, 51]]}}, r"^fairkv\.protect: \[3, 51\] is beyond the prompt"),
        ({"fairkv": "budget"}, r"^fairkv must map"),
        ({"other": [[1]]}, r"^sampling_params: custom_params: Expected .* got `array`\.$"),
        ("fairkv", r"^sampling_params: custom_params: Expected .* got `str`\.$"),
        ({"other": 1 << 70}, r"^sampling_params: "),
        ({"other": object()}, r"^sampling_params: "),
    ],
)
def test_what_no_rank_could_read_is_refused(custom: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        send(custom)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("resolved")
def test_a_turn_of_a_session_has_a_budget_but_no_spans() -> None:
    assert "64" in send({"fairkv": {"budget": 64}}, session_params={"id": "a"})["fairkv"]
    with pytest.raises(ValueError, match="a session has parts"):
        send({"fairkv": {"protect": [[0, 1]]}}, session_params={"id": "a"})


@pytest.mark.usefixtures("resolved")
def test_a_scorer_and_a_scope_reach_a_rank() -> None:
    sent = send({"fairkv": {"scorer": "tova", "scope": "model", "ratio": 0.5}})
    assert isinstance(sent["fairkv"], str)
    request = SimpleNamespace(sampling_params=SimpleNamespace(custom_params=sent))
    keep = request_options.keep_of(request)
    assert keep == Keep(
        BudgetSpec(ratio=0.5), (), make_scorer("tova"), ("model", (("floor_alpha", 0.2),))
    )


@pytest.mark.parametrize(
    ("options", "rope", "replicas", "words"),
    [
        ({"name": "leverage"}, None, 1, "leverage needs one table of rotary .*; snapkv will do"),
        ({"name": "leverage"}, "a table", 2, None),
        ({"name": "snapkv", "group": "max"}, None, 2, "snapkv with these options .* on one rank"),
        ({"name": "snapkv", "group": "max"}, None, 1, None),
        ({"name": "kvzip"}, None, 1, "kvzip has prompts repeated, .*; snapkv will do"),
        ({"name": "kvzap"}, None, 1, "kvzap has weights of its own, .*; snapkv will do"),
        (None, None, 2, None),
    ],
)
def test_what_this_model_can_not_have(
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any] | None,
    rope: Any,
    replicas: int,
    words: str | None,
) -> None:
    """Said by the ranks, as only they know; the request ends and no other."""
    rank = SimpleNamespace(
        scorer=make_scorer("snapkv"),
        heads=SimpleNamespace(homes=SimpleNamespace(replicas=replicas)),
        backend=SimpleNamespace(compressor=SimpleNamespace(rope=rope)),
    )
    monkeypatch.setattr(fairkv_sglang.patches.rank, "_rank", rank)
    keep = Keep(scorer=None if options is None else make_scorer(**options))
    monkeypatch.setattr(request_options, "keep_of", lambda req: keep)
    request, asked_for = Request(keep, 400, 5), []
    request_options.around_init_max_new_tokens(
        lambda scheduler, req: asked_for.append(len(req.origin_input_ids)), None, request
    )
    assert (words is None) == (request.to_finish is None)
    assert asked_for == [400 if words is None else 1]
    assert words is None or re.search(words, request.to_finish)


class Request:
    """SGLang's, as far as its arrival goes."""

    def __init__(self, keep: Keep, tokens: int, wanted: int) -> None:
        self.sampling_params = SimpleNamespace(max_new_tokens=wanted, custom_params={})
        self.keep, self.origin_input_ids, self.to_finish = keep, [0] * tokens, None

    def set_finish_with_abort(self, text: str) -> None:
        self.origin_input_ids, self.to_finish = [0], text


class Scheduler:
    """SGLang's, with a rank of FairKV's."""

    def __init__(self, rank: Any, page_size: int = 1) -> None:
        self.rank = rank
        self.token_to_kv_pool_allocator = SimpleNamespace(
            page_size=page_size, max_new_tokens_for_memory=self._longest
        )

    def _longest(self, tokens: int, wanted: int, **options: Any) -> int | None:
        return scheduling.around_max_new_tokens(
            None, self.token_to_kv_pool_allocator, tokens, wanted, **options
        )

    def arrives(self, keep: Keep, tokens: int, wanted: int = 1 << 30) -> Request:
        """A request after the hook on its arrival."""

        def original(scheduler: Scheduler, req: Request) -> None:
            longest = self._longest(len(req.origin_input_ids), req.sampling_params.max_new_tokens)
            if longest is None:
                req.set_finish_with_abort("Request prompt exceeds the KV memory budget")
            req.sampling_params.max_new_tokens = longest or 0

        request = Request(keep, tokens, wanted)
        with (
            mock.patch.object(fairkv_sglang.patches.rank, "_rank", self.rank),
            mock.patch.object(request_options, "keep_of", lambda req: req.keep),
        ):
            request_options.around_init_max_new_tokens(original, self, request)
            assert request_options.asked() == AS_SERVER
        return request


def scheduler_of(scope: Any, plan: Plan, pages: np.ndarray, most: int = 600) -> Scheduler:
    book = make_books(plan, scope, pages, max_pages=2)[0]
    division = SimpleNamespace(pool_tokens=1000, max_head_tokens=most)
    return Scheduler(SimpleNamespace(book=book, scope=scope, division=division))


def uniform() -> Any:
    return make_scope("uniform", BudgetSpec(tokens=40), 1, 4, make_scorer("snapkv"))


def test_a_request_that_never_fits_is_told_what_does() -> None:
    plan = Plan.from_shares(np.ones((1, 1, 4)), "one rank")
    scheduler = scheduler_of(uniform(), plan, np.array([4 * 12]))  # 12 pages a head
    assert scheduler.arrives(AS_SERVER, 400).to_finish is None
    for keep in (
        Keep(BudgetSpec(ratio=1.0)),
        Keep(BudgetSpec(tokens=300)),
        Keep(None, ((0, 300),)),
    ):
        refused = scheduler.arrives(keep, 400)
        assert re.match(r"fairkv: the options of this request keep \d+ of 400", refused.to_finish)
        assert refused.sampling_params.max_new_tokens == 0
    # Of 12 pages a head two are set aside; the last of ten is for output.
    text = scheduler.arrives(Keep(BudgetSpec(tokens=300)), 400).to_finish
    assert text.endswith("this server has room for a budget of 144 at most.")
    most = [scheduler.arrives(Keep(BudgetSpec(n)), 400) for n in (144, 145, 160)]
    assert [request.sampling_params.max_new_tokens for request in most] == [16, 0, 0]
    assert [request.to_finish for request in most] == [None] * 3
    assert scheduler.arrives(Keep(BudgetSpec(tokens=161)), 400).to_finish is not None
    text = scheduler.arrives(Keep(None, ((0, 300),)), 400).to_finish
    assert text.endswith(
        "keep 333 of 400 tokens in each head, 300 of them protected, which this server has no room "
        "for."
    )
    # Not a matter of its options: the prefill pool is too small.
    assert "exceeds" in scheduler.arrives(Keep(BudgetSpec(tokens=50)), 1000).to_finish


def test_tables_bound_a_request_too() -> None:
    plan = Plan.from_shares(np.ones((1, 1, 4)), "one rank")
    scheduler = scheduler_of(uniform(), plan, np.array([4 * 500]), most=200)
    assert scheduler.arrives(Keep(BudgetSpec(tokens=150)), 400).sampling_params.max_new_tokens == 50
    assert scheduler.arrives(AS_SERVER, 400).sampling_params.max_new_tokens == 160
    text = scheduler.arrives(Keep(BudgetSpec(ratio=1.0)), 400).to_finish
    assert text.endswith("a budget of 199 at most.")


@settings(QUICK, max_examples=60)
@given(seed=seeds, name=st.sampled_from(SCOPES), prompt=st.integers(1, 400))
def test_the_most_that_is_named_fits_and_one_more_does_not(
    seed: int, name: str, prompt: int
) -> None:
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, 2, 2, 4)
    scope = random_scope(rng, name, 2, 4, 2)
    lanes = (plan.shares() > 0).sum(axis=(0, 2))
    scheduler = scheduler_of(scope, plan, lanes * int(rng.integers(4, 20)))
    keep = random_keep(rng, scope)
    request = scheduler.arrives(keep, prompt)
    named = re.search(r"a budget of (\d+) at most", request.to_finish or "")
    if named is None:
        return
    most = int(named[1])
    fits, not_any_more = (
        scheduler.arrives(replace(keep, spec=BudgetSpec(tokens)), prompt)
        for tokens in (most, most + 1)
    )
    assert fits.to_finish is None and fits.sampling_params.max_new_tokens >= 1
    assert not_any_more.sampling_params.max_new_tokens == 0

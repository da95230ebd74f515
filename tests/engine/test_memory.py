# SPDX-License-Identifier: Apache-2.0
"""Compressed prompts make room for more requests, and every page and slot comes back."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairkv_tests.engine_process import EngineProcess
from fairkv_tests.plugin_folder import ABORT_PROBE, LINGER_PROBE, install_plugin
from fairkv_tests.tiny_models import random_prompts
from fairkv_tests.workloads import (
    CHECKS,
    KV_HEADS,
    LAYERS,
    RETRACTS,
    STRESS,
    STRESS_TOKENS,
    saw_retraction,
    write_plan,
)

HELD = ("pages_used", "pages_charged", "tokens_stored", "requests", "pool_tokens_held")
"""What a rank must not have at idle; slots of cached prefixes belong to no request."""


def _idle_state(engine: EngineProcess) -> dict[str, Any]:
    """State after SGLang's idle check had its turn; nothing may be held."""
    time.sleep(2)
    state = engine.fairkv()
    for rank in state["ranks"]:
        held = {key: rank[key] for key in HELD}
        assert held == dict.fromkeys(HELD, 0)
    assert state["rank_loads"] == [0] * len(state["ranks"])
    assert "leak" not in engine.log
    return state


# -- more requests at once ------------------------------------------------------------------------

POOL = 32_768
"""Tokens of full KV that an engine has memory for."""
PROMPT, OUTPUT, REQUESTS = 2000, 32, 60
STOCK_HOLDS = POOL // (PROMPT + OUTPUT)


def _most_decoding(engine: EngineProcess) -> int:
    """Largest batch of a decode step, as SGLang itself logs every one of them."""
    sizes = re.findall(r"Decode batch[^\n]*?#running-req: (\d+)", engine.log)
    assert len(sizes) >= OUTPUT - 1
    return max(map(int, sizes))


def _full_house(
    tiny_model: Callable[..., Path], tmp_path: Path, requests: int, fairkv: dict[str, Any] | None
) -> EngineProcess:
    """An engine that has served so many prompts of 2,000 tokens, sent all at once."""
    engine = EngineProcess(
        tiny_model(layers=2, q_heads=8, kv_heads=4),
        tmp_path / "log",
        fairkv=fairkv,
        environment=CHECKS,
        max_total_tokens=POOL,
        max_running_requests=REQUESTS,
        chunked_prefill_size=2048,
        disable_radix_cache=True,
        decode_log_interval=1,
    )
    prompts = random_prompts([PROMPT] * requests, vocab=500, seed=5)
    outputs = engine.generate(prompts, OUTPUT)
    assert [len(output) for output in outputs] == [OUTPUT] * requests
    return engine


def test_three_times_as_many_requests_decode_together(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A quarter kept, against all that fit into the same bytes without FairKV."""
    fairkv = {"ratio": 0.25, "prefill_pool": 4200}
    engine = _full_house(tiny_model, tmp_path, REQUESTS, fairkv)
    try:
        assert _most_decoding(engine) >= 3 * STOCK_HOLDS
        state = _idle_state(engine)
    finally:
        engine.close()
    rank = state["ranks"][0]
    # the bytes of stock: 2 x 4 bytes x 32 x 4 heads x 2 layers for a token
    assert rank["total_bytes"] == POOL * 2 * 4 * 32 * 4 * 2
    assert rank["pool_bytes"] + rank["pages"] * rank["page_bytes"] <= rank["total_bytes"]
    assert state["compactions"] >= REQUESTS  # more after a retraction


@pytest.mark.sweep
def test_stock_holds_what_its_memory_allows(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The other side of the comparison, with the same flags and more to do than fits."""
    assert STOCK_HOLDS < REQUESTS // 3
    engine = _full_house(tiny_model, tmp_path, REQUESTS // 3, None)
    try:
        assert _most_decoding(engine) == STOCK_HOLDS
    finally:
        engine.close()


# -- stress ---------------------------------------------------------------------------------------

ADMIT = re.compile(r"(?:TP(\d))?\] FairKV decision (\d+) (\w+) row (\d+) (\w+)")


def _decisions(engine: EngineProcess) -> dict[str, list[tuple[str, ...]]]:
    """Per rank what it logged: (number, what, row, digest of the details)."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for rank, *decision in ADMIT.findall(engine.log):
        found.setdefault(rank or "0", []).append(tuple(decision))
    return found


def _unsettled(decisions: list[tuple[str, ...]]) -> int:
    """Rows that were freed in the middle of their prefill."""
    last: dict[str, str] = {}
    count = 0
    for _, what, row, _ in decisions:
        count += what == "free" and last.get(row) == "admit"
        last[row] = what
    return count


@pytest.fixture(scope="module")
def stress(stock: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TP 2, a copied placement, full budgets, small chunks in mixed batches, and an arena that is
    too small for what SGLang is told to admit.
    """
    folder = tmp_path_factory.mktemp("stress")
    probe = install_plugin(folder / "plugin", "probes", ABORT_PROBE + LINGER_PROBE)
    engine = EngineProcess(
        stock("llama").model,
        folder / "log",
        fairkv={
            "ratio": 1.0,
            "plan": write_plan(folder, 2, 21),
            "replan": "off",
            "arena_pages": 1400,
            "prefill_pool": 1600,
            "log_decisions": True,
        },
        environment={**CHECKS, **RETRACTS, "PYTHONPATH": str(probe)},
        tp_size=2,
        max_total_tokens=16_384,
        max_running_requests=12,
        chunked_prefill_size=64,
        enable_mixed_chunk=True,
        schedule_conservativeness=0.01,
    )
    yield engine
    engine.close()


@pytest.mark.timeout(900)
def test_stress_leaves_nothing_behind(stock: Callable[[str], Any], stress: EngineProcess) -> None:
    """Retractions, prefix hits, chunks of 64, mixed batches and aborts at every stage."""
    expected = stock("llama").stress_outputs
    assert stress.generate_each(STRESS, STRESS_TOKENS) == expected
    assert saw_retraction(stress.log)

    # while decoding (after 1 to 6 tokens), and in the queue (12 run at a time)
    prompts = [prompt for prompt in STRESS if len(prompt) > 30][:20]
    limits: list[int | None] = [1 + i % 6 for i in range(8)] + [None] * 6 + [0] * 6
    reasons = stress.call("generate_and_abort", prompts=prompts, new_tokens=60, abort_after=limits)
    assert reasons == ["length" if limit is None else "abort" for limit in limits]

    # in chunked prefill: 1,200 tokens are 19 passes
    for prompt in random_prompts([1200] * 3, vocab=500, seed=6):
        reason = stress.call("abort_in_prefill", prompt=prompt, log=str(stress.log_file))
        assert reason == "abort"
    decisions = _decisions(stress)
    assert _unsettled(decisions["0"]) >= 3

    state = _idle_state(stress)
    assert state["ranks"][0]["handed_over_tokens"] >= sum(map(len, STRESS))
    assert max(rank["peak_pages_charged"] for rank in state["ranks"]) > 1300
    stress.call("empty_cache")
    assert stress.generate_each(STRESS, STRESS_TOKENS) == expected
    _idle_state(stress)


def test_ranks_take_the_same_decisions(stress: EngineProcess) -> None:
    """The logs of both ranks: the same admissions, kept counts, owners and releases, in order."""
    stress.generate_each(STRESS[:6], STRESS_TOKENS[:6])
    _idle_state(stress)
    decisions = _decisions(stress)
    assert set(decisions) == {"0", "1"}
    assert decisions["0"] == decisions["1"]
    kinds = [what for _, what, _, _ in decisions["0"]]
    assert {"admit", "settle", "free"} == set(kinds)
    assert kinds.count("admit") == kinds.count("free") >= kinds.count("settle") > 0


def _abort_after_the_prompt(engine: EngineProcess) -> None:
    """Abort half of a batch right behind the pass that compresses it, before a decode step."""
    prompts = [prompt for prompt in STRESS if len(prompt) > 30][:12]
    names = [f"abort-at-once-{i:02}" if i % 2 else f"goes-on-{i:02}" for i in range(len(prompts))]
    parameters = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
    results = engine.call("generate", input_ids=prompts, sampling_params=parameters, rid=names)
    for name, result in zip(names, results, strict=True):
        aborted = name.startswith("abort")
        assert result["meta_info"]["finish_reason"]["type"] == ("abort" if aborted else "length")
    seen = re.findall(r"PROBE aborted (\S+) with (\d+) tokens", engine.log)
    ranks = len(engine.fairkv()["ranks"])
    assert {tokens for _, tokens in seen} <= {"0", "1"}  # without overlap the prompt's is there
    assert sorted(n for n, _ in seen) == sorted([n for n in names if n[0] == "a"] * ranks)


def test_abort_between_compression_and_first_decode(
    stock: Callable[[str], Any], stress: EngineProcess
) -> None:
    """Pages that were just filled come back, on every rank, and later answers are right."""
    _abort_after_the_prompt(stress)
    _idle_state(stress)
    decisions = _decisions(stress)
    assert decisions["0"] == decisions["1"]
    few = slice(0, 8)
    assert (
        stress.generate_each(STRESS[few], STRESS_TOKENS[few])
        == (stock("llama").stress_outputs[few])
    )
    _idle_state(stress)


def test_pages_hold_the_kept_tokens_and_no_more(stress: EngineProcess) -> None:
    """While requests decode: tokens of all lanes fill their pages but for less than a page each."""
    prompts = [prompt for prompt in STRESS if len(prompt) > 80][:5]
    seen = stress.call("states_while_running", prompts=prompts, new_tokens=60, after=8)
    state = seen["states"][0]["fairkv"]
    assert state["decisions_agree"]
    # every (layer, head) of every request is on exactly one rank
    kept = sum(map(len, prompts)) * LAYERS * KV_HEADS
    for read in (sum(rank["tokens_stored"] for rank in state["ranks"]), sum(state["rank_loads"])):
        assert (read - kept) % (LAYERS * KV_HEADS) == 0
        decoded = (read - kept) // (LAYERS * KV_HEADS)
        assert 8 * len(prompts) - len(prompts) <= decoded <= 60 * len(prompts)
    # what the next step reads on each rank: at most one step ahead of what is stored
    for rank, load in zip(state["ranks"], state["rank_loads"], strict=True):
        assert abs(load - rank["tokens_stored"]) <= rank["lanes"] * len(prompts)
    for rank in state["ranks"]:
        assert rank["pages_used"] == rank["pages_charged"]
        spare = rank["pages_used"] * 16 - rank["tokens_stored"]
        assert 0 <= spare <= 15 * rank["lanes"] * len(prompts)
    _idle_state(stress)


@pytest.mark.sweep
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ({"page_size": 16}, {}),
        ({"disable_radix_cache": True}, {}),
        ({"disable_overlap_schedule": True, "page_size": 16}, {"SGLANG_TEST_RETRACT": "1"}),
        ({"enable_mixed_chunk": False, "tp_size": 4}, {"SGLANG_TEST_RETRACT": "1"}),
        ({"tp_size": 1, "schedule_policy": "fcfs"}, {}),
        # SGLang sets 24 GB aside for a prefill without chunks; the host may have less
        (
            {"chunked_prefill_size": -1, "enable_mixed_chunk": False, "mem_fraction_static": 0.5},
            {},
        ),
    ],
    ids=["pages-of-16", "no-radix", "no-overlap-retract", "tp4-retract", "tp1", "no-chunks"],
)
def test_stress_under_other_options(
    stock: Callable[[str], Any],
    tmp_path: Path,
    arguments: dict[str, Any],
    environment: dict[str, str],
) -> None:
    """The same load under other settings of SGLang's scheduler and caches."""
    tp_size = arguments.get("tp_size", 2)
    probe = install_plugin(tmp_path / "plugin", "probes", ABORT_PROBE + LINGER_PROBE)
    engine = EngineProcess(
        stock("llama").model,
        tmp_path / "log",
        fairkv={
            "ratio": 1.0,
            "plan": write_plan(tmp_path, tp_size, 21),
            "replan": "off",
            "arena_pages": 2800 // tp_size,
            "prefill_pool": 1600,
            "log_decisions": True,
        },
        environment={**CHECKS, **environment, "PYTHONPATH": str(probe)},
        **{
            "tp_size": 2,
            "max_total_tokens": 16_384,
            "max_running_requests": 12,
            "chunked_prefill_size": 64,
            "enable_mixed_chunk": True,
            "schedule_conservativeness": 0.01,
            **arguments,
        },
    )
    try:
        expected = stock("llama").stress_outputs
        assert engine.generate_each(STRESS, STRESS_TOKENS) == expected
        assert saw_retraction(engine.log)
        prompts = [prompt for prompt in STRESS if len(prompt) > 30][:16]
        limits: list[int | None] = [(1, 2, 3, None)[i % 4] for i in range(16)]
        engine.call("generate_and_abort", prompts=prompts, new_tokens=60, abort_after=limits)
        _abort_after_the_prompt(engine)
        _idle_state(engine)
        engine.call("empty_cache")
        assert engine.generate_each(STRESS, STRESS_TOKENS) == expected
        _idle_state(engine)
        decisions = _decisions(engine)
        assert len(decisions) == tp_size
        assert all(log == decisions["0"] for log in decisions.values())
    finally:
        engine.close()

# SPDX-License-Identifier: Apache-2.0
"""Outputs compressed while they are written: constant memory, the same tokens at every TP size."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairkv_tests.engine_process import EngineProcess
from fairkv_tests.plugin_folder import EXACT_SUMS, install_plugin
from fairkv_tests.tiny_models import random_prompts
from fairkv_tests.workloads import CHECKS, KV_HEADS, LAYERS, MODEL, write_plan

BUDGET, SLACK, OUTPUT = 64, 32, 200
FAIRKV: dict[str, Any] = {
    "budget": BUDGET,
    "decode_compression": True,
    "decode_slack": SLACK,
    "decode_scorer": "attention",
    "prefill_pool": 2000,
}
PROMPTS = random_prompts([1, 20, 63, 64, 100, 150, 300, 400], vocab=500, seed=8)
HEADS = LAYERS * KV_HEADS
PAGES = len(PROMPTS) * HEADS * (BUDGET + SLACK) // 16
"""Head pages of a rank at TP 2: twice what all of these hold at most, so that the most that their
prompts could take is there, too.
"""
WITHOUT = sum(HEADS * ((min(len(p), BUDGET) + OUTPUT) // 16) for p in PROMPTS)
"""Pages of both ranks that they would hold at their ends if outputs were kept."""


def _due(written: int) -> int:
    """Compressions of all requests in so many decode steps; short prompts fill up first."""
    return sum((written - max(BUDGET - len(prompt), 0)) // SLACK for prompt in PROMPTS)


def _outputs(engine: EngineProcess) -> tuple[list[list[int]], dict[str, Any]]:
    outputs = engine.generate(PROMPTS, OUTPUT)
    time.sleep(2)  # SGLang's idle check, after which the last pages are back
    state = engine.fairkv()
    for rank in state["ranks"]:
        assert rank["pages_used"] == rank["pages_charged"] == rank["tokens_stored"] == 0
    # The first token comes from the prompt; with overlap scheduling there is a step too many.
    assert _due(OUTPUT - 1) <= state["outputs"]["compressions"] <= _due(OUTPUT)
    assert "Retract requests" not in engine.log
    return outputs, state


def test_memory_is_constant_and_answers_are_those_of_tp_1(
    tiny_model: Callable[..., Path], start_engine: Callable[..., EngineProcess], tmp_path: Path
) -> None:
    """Eight requests write together what memory would not hold without compression."""
    assert WITHOUT > 2 * PAGES
    model = tiny_model(**MODEL)
    shared = {"environment": CHECKS, "max_total_tokens": 30_000}
    plan = write_plan(tmp_path, 2, 21)
    fairkv = {**FAIRKV, "plan": plan, "replan": "off", "arena_pages": PAGES}
    two = start_engine(model, fairkv=fairkv, tp_size=2, **shared)
    outputs, state = _outputs(two)
    assert all(pages > 0 for pages in state["outputs"]["freed_pages"])
    assert (state["outputs"]["slack"], state["outputs"]["window"]) == (SLACK, 8)
    assert [rank["peak_requests"] for rank in state["ranks"]] == [len(PROMPTS)] * 2
    two.close()
    one = start_engine(model, fairkv=FAIRKV, **shared)
    assert _outputs(one)[0] == outputs


# -- 4,000 tokens ---------------------------------------------------------------------------------

LONG, BUDGET_OF_LONG = 4000, 512
PAGES_PROBE = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
steps = [0]
def look(result, scheduler, *args, **kwargs):
    from fairkv_sglang.patches.rank import this_rank
    book = this_rank().book
    steps[0] += 1
    if steps[0] % 50 == 0:
        mark("pages", book.heads.rank, steps[0], book.pages.num_used)
HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", look, HookType.AFTER)
"""
"""Says how many head pages a rank has in use, every 50 passes."""


LONG_PROMPTS = random_prompts([200, 1500], vocab=500, seed=9)


def _long(model: Path, folder: Path, tp_size: int, scorer: str) -> list[list[int]]:
    """4,000 tokens for each of two requests; pages stay constant once the budget is full."""
    exact = EXACT_SUMS if scorer == "attention" else ""
    probe = install_plugin(folder / "probe", "pages_probe", PAGES_PROBE + exact)
    placed = {"plan": write_plan(folder, tp_size, 21)} if tp_size > 1 else {}
    engine = EngineProcess(
        model,
        folder / "log",
        fairkv={
            "budget": BUDGET_OF_LONG,
            "decode_compression": True,
            "decode_scorer": scorer,
            "replan": "off",
            "prefill_pool": 9000,
            **placed,
        },
        environment={"PYTHONPATH": str(probe)},
        max_total_tokens=60_000,
        tp_size=tp_size,
    )
    engine.patience = 1500
    try:
        outputs = engine.generate(LONG_PROMPTS, LONG)
        state = engine.fairkv()
    finally:
        engine.close()
    assert [len(output) for output in outputs] == [LONG] * 2
    sums = engine.log.count("PROBE exact")  # of four projections a layer, twins, and the logits
    assert sums >= (4 * LAYERS + 1) * tp_size if exact else sums == 0
    assert state["outputs"]["compressions"] >= 2 * (LONG - BUDGET_OF_LONG) // 128
    curve: dict[int, list[int]] = {}
    for rank, pages in re.findall(r"PROBE pages (\d+) \d+ (\d+)", engine.log):
        curve.setdefault(int(rank), []).append(int(pages))
    assert sorted(curve) == list(range(tp_size))
    for rank, pages in curve.items():
        full = pages[(BUDGET_OF_LONG + 128) // 50 + 2 :]  # the short one has filled its budget
        quarter = len(full) // 4
        assert quarter > 15
        # in the first and in the last quarter: the same teeth of a saw
        assert max(full[:quarter]) == pytest.approx(max(full[-quarter:]), rel=0.02)
        print(f"TP {tp_size} rank {rank}: pages", pages[::8], "most", max(pages))
    return outputs


@pytest.fixture(scope="module")
def long_model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(**MODEL, context=8192)


@pytest.fixture(scope="module", params=["keydiff", "attention"])
def scorer(request: pytest.FixtureRequest) -> str:
    """What outputs are compressed by."""
    return str(request.param)


@pytest.fixture(scope="module")
def of_one_rank(
    long_model: Path, tmp_path_factory: pytest.TempPathFactory, scorer: str
) -> list[list[int]]:
    return _long(long_model, tmp_path_factory.mktemp("one"), 1, scorer)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_4000_tokens_at_a_budget_of_512(
    long_model: Path, of_one_rank: list[list[int]], tmp_path: Path, scorer: str, tp_size: int
) -> None:
    """At TP 1, 2 and 4 token for token, in constant memory.

    By attention with exact sums: otherwise one of these 8,000 tokens is another at TP 4, as two
    logits of the model are equal there (docs/long-outputs.md).
    """
    for found, want in zip(_long(long_model, tmp_path, tp_size, scorer), of_one_rank, strict=True):
        differ = [place for place in range(LONG) if found[place] != want[place]]
        assert not differ, f"the first of {len(differ)} tokens that differ is {differ[0]}"

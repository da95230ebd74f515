# SPDX-License-Identifier: Apache-2.0
"""Outputs compressed while they are written: constant memory, the same tokens at every TP size."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_tests.engine_process import EngineProcess
from fairkv_tests.plugin_folder import install_plugin
from fairkv_tests.tiny_models import random_prompts
from fairkv_tests.workloads import CHECKS, KV_HEADS, LAYERS, MODEL, write_plan

BUDGET, SLACK, OUTPUT = 64, 32, 320
FAIRKV: dict[str, Any] = {
    "budget": BUDGET,
    "decode_compression": True,
    "decode_slack": SLACK,
    "prefill_pool": 2000,
}
PROMPTS = random_prompts([1, 20, 63, 64, 100, 150, 300, 400], vocab=500, seed=8)
PAGES_OF_A_HEAD = -(-(BUDGET + SLACK) // 16)
PAGES = 2 * 8 * PAGES_OF_A_HEAD * LAYERS * KV_HEADS // 2
"""Head pages of a rank at TP 2: twice what all of these requests hold, a third of what they write."""


def _outputs(engine: EngineProcess) -> tuple[list[list[int]], dict[str, Any]]:
    outputs = engine.generate(PROMPTS, OUTPUT)
    state = engine.fairkv()
    for rank in state["ranks"]:
        assert rank["pages_used"] == rank["pages_charged"] == rank["tokens_stored"] == 0
    return outputs, state


def test_memory_is_constant_and_answers_are_those_of_tp_1(
    tiny_model: Callable[..., Path], start_engine: Callable[..., EngineProcess], tmp_path: Path
) -> None:
    """Eight requests decode together where without compression three would, none is retracted."""
    model = tiny_model(**MODEL)
    shared = {"environment": CHECKS, "max_total_tokens": 30_000}
    plan = write_plan(tmp_path, 2, 21)
    fairkv = {**FAIRKV, "plan": plan, "replan": "off", "arena_pages": PAGES}
    two = start_engine(model, fairkv=fairkv, tp_size=2, **shared)
    outputs, state = _outputs(two)
    half = state["outputs"]["compressions"]
    # Those that begin below the budget fill it first; the last step's are dropped with their row.
    due = sum((OUTPUT - 1 - max(BUDGET - len(p), 0)) // SLACK for p in PROMPTS)
    assert due - len(PROMPTS) <= half <= due
    assert all(pages > 0 for pages in state["outputs"]["freed_pages"])
    assert (state["outputs"]["slack"], state["outputs"]["window"]) == (SLACK, 8)
    for rank in state["ranks"]:
        assert rank["peak_requests"] == len(PROMPTS)
        unbounded = len(PROMPTS) * (OUTPUT // 16) * rank["lanes"] / 2  # copies: half of them or so
        assert rank["peak_pages_charged"] <= PAGES < unbounded
    assert state["spills"] == 0 and "retract" not in two.log.lower().replace("retract_decode", "")
    two.close()

    one = start_engine(model, fairkv=FAIRKV, **shared)
    assert _outputs(one)[0] == outputs
    one.close()


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


@pytest.mark.sweep
def test_4000_tokens_at_a_budget_of_512(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """At TP 1, 2 and 4 token for token, with and without redundancy in turn; pages stay constant
    once the budget is full.
    """
    model = tiny_model(**MODEL, context=8192)
    probe = install_plugin(tmp_path / "probe", "pages_probe", PAGES_PROBE)
    prompts = random_prompts([200, 1500], vocab=500, seed=9)
    found: dict[int, list[list[int]]] = {}
    for tp_size in (1, 2, 4):
        engine = EngineProcess(
            model,
            tmp_path / f"log-{tp_size}",
            fairkv={
                "budget": BUDGET_OF_LONG,
                "decode_compression": True,
                "replan": "off",
                "prefill_pool": 9000,
                **({"plan": write_plan(tmp_path, tp_size, 21)} if tp_size > 1 else {}),
            },
            environment={**CHECKS, "PYTHONPATH": str(probe)},
            max_total_tokens=60_000,
            tp_size=tp_size,
        )
        try:
            found[tp_size] = engine.generate(prompts, LONG)
            state = engine.fairkv()
        finally:
            engine.close()
        assert [len(output) for output in found[tp_size]] == [LONG] * 2
        curve: dict[int, list[int]] = {}
        for rank, pages in re.findall(r"PROBE pages (\d+) \d+ (\d+)", engine.log):
            curve.setdefault(int(rank), []).append(int(pages))
        assert sorted(curve) == list(range(tp_size))
        for rank, pages in curve.items():
            full = pages[
                (BUDGET_OF_LONG + 128) // 50 + 2 :
            ]  # the short prompt has filled its budget
            assert len(full) > 60
            # in the first and in the last quarter: the same teeth of a saw
            quarter = len(full) // 4
            assert max(full[:quarter]) == pytest.approx(max(full[-quarter:]), rel=0.02)
            print(f"TP {tp_size} rank {rank}: pages", pages[::8], "most", max(pages))
        assert state["outputs"]["compressions"] >= 2 * (LONG - BUDGET_OF_LONG) // 128
        assert np.all([rank["pages_used"] == 0 for rank in state["ranks"]])
    assert found[1] == found[2] == found[4]

# SPDX-License-Identifier: Apache-2.0
"""Prompts that need more head pages than they were charged: their requests come back, nothing is
lost, and answers are those of a server that charges the most that a prompt could need.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_sglang.memory.forecast import LEAST_SEEN
from fairkv_tests.engine_process import EngineProcess
from fairkv_tests.tiny_models import random_prompts
from fairkv_tests.workloads import CHECKS, MODEL, write_plan

HELD = ("pages_used", "pages_charged", "tokens_stored", "requests", "pool_tokens_held")
COUNT = 32
LENGTHS = np.random.default_rng(6).integers(250, 350, COUNT).tolist()
PROMPTS = random_prompts(LENGTHS, vocab=500, seed=12)
TOKENS = [(1, 2, 20, 60)[i % 4] for i in range(COUNT)]
PAGES = 600
"""For a few requests, so that no prompt gets its bound for the asking."""
ENGINE: dict[str, Any] = {
    "environment": CHECKS,
    "tp_size": 2,
    "max_total_tokens": 30_000,
    "max_running_requests": 8,
    "chunked_prefill_size": 128,
    "schedule_conservativeness": 10,  # all outputs are expected in full: no other retractions
}


@dataclass(frozen=True)
class Reference:
    """Answers without spills: to each prompt, and to each with the first token of its answer."""

    model: Path
    plan: str
    whole: list[list[int]]
    rest: list[list[int]]

    def answer(self, number: int, retracted: int) -> list[int]:
        """What a request gives that was retracted after its first token, or was not."""
        whole = self.whole[number]
        return [whole[0], *self.rest[number]][: TOKENS[number]] if retracted else whole


def options(plan: str, forecast_factor: float, pages: int) -> dict[str, Any]:
    """FairKV's."""
    debug = {"forecast_factor": forecast_factor, "arena_pages": pages, "log_decisions": True}
    return {"ratio": 0.3, "replan": "off", "prefill_pool": 4000, "plan": plan, "debug": debug}


@pytest.fixture(scope="module")
def reference(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    """Forecasts far above any bound: nothing spills."""
    folder, model = tmp_path_factory.mktemp("reference"), tiny_model(**MODEL)
    plan = write_plan(folder, 2, 21)
    engine = EngineProcess(model, folder / "log", fairkv=options(plan, 1e6, 5000), **ENGINE)
    try:
        whole = engine.generate_each(PROMPTS, TOKENS)
        longer = [[*prompt, answer[0]] for prompt, answer in zip(PROMPTS, whole, strict=True)]
        rest = engine.generate_each(longer, [max(count - 1, 1) for count in TOKENS])
        assert engine.fairkv()["spills"] == 0
    finally:
        engine.close()
    return Reference(model, plan, whole, rest)


@pytest.mark.sweep  # in every run prompts spill in the storm of test_chaos
@pytest.mark.parametrize(
    "arguments",
    [
        {"enable_mixed_chunk": True},
        {"disable_overlap_schedule": True, "disable_radix_cache": True},
    ],
    ids=["overlap", "no-overlap-no-radix"],
)
def test_spilled_requests_come_back(
    reference: Reference, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    fairkv = options(reference.plan, 0.9, PAGES)
    engine = EngineProcess(
        reference.model, tmp_path / "log", fairkv=fairkv, **{**ENGINE, **arguments}
    )
    try:
        engine.generate(random_prompts([200] * (LEAST_SEEN + 4), vocab=500, seed=13), 2)
        before = engine.fairkv()
        parameters = [
            {"temperature": 0, "max_new_tokens": count, "ignore_eos": True} for count in TOKENS
        ]
        results = engine.call("generate", input_ids=PROMPTS, sampling_params=parameters)
        after = engine.fairkv()
        retracted = [result["meta_info"]["num_retractions"] for result in results]
        assert "Retract requests" not in engine.log
        assert max(retracted) == 1 and COUNT // 8 <= sum(retracted) < COUNT * 3 // 4, retracted
        assert after["spills"] - before["spills"] == sum(retracted)
        ended = [count == 1 for count in TOKENS]
        assert not any(r for r, end in zip(retracted, ended, strict=True) if end)
        # each prompt is recorded once, but for those of which nothing is read any more
        assert after["compactions"] - before["compactions"] == COUNT - sum(ended)
        for number, result in enumerate(results):
            expected = reference.answer(number, retracted[number])
            assert result["output_ids"] == expected, (number, retracted[number])

        limits: list[int | None] = [(1, 2, None, 0)[i % 4] for i in range(COUNT)]
        fresh = random_prompts(LENGTHS, vocab=500, seed=14)
        reasons = engine.call(
            "generate_and_abort", prompts=fresh, new_tokens=20, abort_after=limits
        )
        assert reasons == ["length" if limit is None else "abort" for limit in limits]
        time.sleep(2)  # SGLang's idle check has its turn
        state = engine.fairkv()
        assert state["spills"] > after["spills"] and state["decisions_agree"]
        for rank in state["ranks"]:
            assert {key: rank[key] for key in HELD} == dict.fromkeys(HELD, 0)
        assert "leak" not in engine.log
    finally:
        engine.close()

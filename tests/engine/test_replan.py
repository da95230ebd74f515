# SPDX-License-Identifier: Apache-2.0
"""Plans that follow the traffic: balance without a profile, and answers that no plan changes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_sglang.placement import CostModel, make_plan
from fairkv_tests.engine_process import EngineProcess
from fairkv_tests.workloads import CHECKS, RETRACTS, STRESS, STRESS_TOKENS, saw_retraction

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind everything else: kernels/ must not be found first

from demo.prompts import make_prompts  # noqa: E402

DEMO = ROOT / "demo" / "model"
NEAR = 0.03
"""How far the realised max/mean may be above that of a plan made offline from the same counts."""


def _settled(engine: EngineProcess, seconds: float = 20) -> dict[str, Any]:
    """FairKV's state when the planner's answer to the last prompts has come."""
    deadline = time.monotonic() + seconds
    while (state := engine.fairkv())["replans"] == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    return state


@pytest.mark.parametrize(
    ("tp_size", "beside"),
    [
        (2, False),
        pytest.param(2, True, marks=pytest.mark.sweep),
        pytest.param(4, True, marks=pytest.mark.sweep),
    ],
)
def test_balance_comes_from_the_traffic(
    start_engine: Callable[..., EngineProcess], tmp_path: Path, tp_size: int, beside: bool
) -> None:
    """No profile, at most 64 prompts: as balanced as a plan that was made from their counts.

    ``beside``: a server that starts with such a plan, on the same requests.
    """
    engine = start_engine(DEMO, fairkv={"ratio": 0.25}, tp_size=tp_size, max_total_tokens=32768)
    assert engine.fairkv()["plan_source"] == "even"
    prompts = [p.token_ids for p in make_prompts(seed=5, count=72, tokens=1024, facts=8)]
    for first in range(0, 64, 8):
        engine.generate(prompts[first : first + 8], new_tokens=24)
        if first == 8:
            _settled(engine)
    state = engine.fairkv()
    assert state["replans"] >= 1
    assert state["plan_source"] == "traffic" and state["plan"]["policy"] == "fair_copying"
    assert state["traffic"]["prompts"] == 64
    realised = _while_decoding(engine, prompts[64:])
    engine.close()

    # Beside it a server that starts with a plan made from the same counts.
    kept = np.array(state["kept"]["tokens"]) / state["kept"]["prompts"]
    plan = make_plan(
        "fair_copying",
        kept,
        tp_size,
        cost=CostModel.model_validate(state["planned"]["cost_model"]),
        max_lanes=state["ranks"][0]["lane_slots"] // len(kept),
    )
    even = make_plan("contiguous", kept, tp_size).info["token_imbalance"]
    assert realised < even - 0.1
    if not beside:
        return
    plan.to_file(tmp_path / "plan.json")
    static = {"ratio": 0.25, "plan": str(tmp_path / "plan.json"), "replan": "off"}
    offline = start_engine(DEMO, fairkv=static, tp_size=tp_size, max_total_tokens=32768)
    assert realised <= _while_decoding(offline, prompts[64:]) + NEAR


def _while_decoding(engine: EngineProcess, prompts: list[list[int]]) -> float:
    """max/mean of what the ranks read when each prompt has 30 new tokens."""
    running = engine.call("states_while_running", prompts=prompts, new_tokens=60, after=30)
    state = running["states"][0]["fairkv"]
    assert min(state["rank_loads"]) > 0
    return 1 / float(state["balancedness"])


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("tp_size", "ratio", "arena_pages", "replans"),
    [
        (2, 1.0, 1400, 12),
        pytest.param(2, 1.0, 1400, 200, marks=pytest.mark.sweep),
        pytest.param(4, 1.0, 700, 40, marks=pytest.mark.sweep),
        # Compressed, with memory for everybody: a prompt that comes back keeps other tokens.
        pytest.param(2, 0.5, 6000, 60, marks=pytest.mark.sweep),
    ],
)
def test_no_plan_changes_an_answer(
    stock: Callable[[str], Any],
    start_engine: Callable[..., EngineProcess],
    tp_size: int,
    ratio: float,
    arena_pages: int,
    replans: int,
) -> None:
    """Random placements one after the other under load, with aborts, retractions and flushes:
    stock SGLang's answers at the full budget, with less those of a server that never plans.
    """
    model, wanted = stock("llama").model, stock("llama").stress_outputs
    if ratio < 1:
        options = {"ratio": ratio, "replan": "off"}
        calm = start_engine(model, fairkv=options, tp_size=tp_size, max_total_tokens=40_000)
        wanted = calm.generate_each(STRESS, STRESS_TOKENS)
        calm.close()
    engine = start_engine(
        model,
        fairkv={
            "ratio": ratio,
            "spare_lanes": 2,
            "prefill_pool": 2600,
            "arena_pages": arena_pages,
        },
        environment={**CHECKS, **(RETRACTS if ratio == 1.0 else {}), "FAIRKV_TEST_PLANS": "random"},
        tp_size=tp_size,
        max_total_tokens=16_384,
        max_running_requests=24,
        chunked_prefill_size=64,
        enable_mixed_chunk=True,
        schedule_conservativeness=0.01,
    )
    aborts = [n // 2 if i % 5 == 4 and n > 2 else None for i, n in enumerate(STRESS_TOKENS)]
    served = engine.call(
        "serve_while_replanning",
        prompts=STRESS,
        new_tokens=STRESS_TOKENS,
        abort_after=aborts,
        replans=replans,
    )
    assert served["replans"] >= replans
    for outputs in served["rounds"]:
        for output, want, abort in zip(outputs, wanted, aborts, strict=True):
            assert output == want or (output is None and abort is not None)
    state = engine.fairkv()  # digests of the decisions are equal on all ranks
    assert state["rank_loads"] == [0] * tp_size
    assert all(r["pages_used"] == r["pages_charged"] == r["requests"] == 0 for r in state["ranks"])
    assert all(r["lane_weight_bytes"] > 0 for r in state["ranks"])
    assert saw_retraction(engine.log) == (ratio == 1.0)
    assert "leak" not in engine.log


@pytest.mark.sweep
def test_advise_says_so_and_changes_nothing(start_engine: Callable[..., EngineProcess]) -> None:
    engine = start_engine(
        DEMO, fairkv={"ratio": 0.25, "replan": "advise"}, tp_size=2, max_total_tokens=32768
    )
    prompts = [p.token_ids for p in make_prompts(seed=6, count=20, tokens=512, facts=4)]
    engine.generate(prompts, new_tokens=4)
    engine.generate(prompts[:1], new_tokens=4)
    deadline = time.monotonic() + 20
    while "--fairkv-replan advise" not in engine.log and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "FairKV: a new plan would be 1." in engine.log
    state = engine.fairkv()
    assert (state["replan"], state["replans"], state["plan_source"]) == ("advise", 0, "even")

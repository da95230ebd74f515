# SPDX-License-Identifier: Apache-2.0
"""The planner beside the server: when a plan is worth adopting, and the process that makes it."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

import fairkv_sglang.control.proposals as proposals_module
from fairkv_sglang.control.proposals import GAIN, TEST_PLANS, Proposals, propose
from fairkv_sglang.placement import CostModel, Plan, Planner
from fairkv_sglang.placement.modelled_step import modelled_step

LAYERS, RANKS, HEADS = 3, 2, 8
COST = CostModel.for_device(
    "cpu", head_dim=64, hidden_size=64, group=2, weight_bytes=4, kv_bytes=4, batch=32
)
PLANNER = Planner(tp_size=RANKS, cost=COST, model="m", slots=5)


def question(skew: float, **changes: Any) -> dict[str, Any]:
    """Requests whose first heads keep more, on SGLang's own split."""
    rng = np.random.default_rng(1)
    shares = np.exp(skew * np.linspace(1, -1, HEADS)) * rng.uniform(0.95, 1.05, (16, LAYERS, HEADS))
    served = np.zeros((LAYERS, RANKS, HEADS), dtype=bool)
    served[:, 0, :4] = served[:, 1, 4:] = True
    return {
        "requests": np.rint(500 * shares).tolist(),
        "served": served.tolist(),
        "planner": PLANNER.model_dump(),
        "forced": False,
        **changes,
    }


def test_even_traffic_needs_no_new_plan() -> None:
    answer = propose(question(0.0))
    assert answer["plan"] is None and 0.9 < answer["gain"] < GAIN


def test_a_plan_is_proposed_when_it_is_faster_than_the_best_use_of_the_lanes() -> None:
    asked = question(1.0)
    answer = propose(asked)
    plan = Plan.from_json(answer["plan"])
    served = plan.shares() > 0
    assert served.sum(axis=2).max() <= PLANNER.slots
    loads = np.mean(asked["requests"], axis=0)
    before = modelled_step(np.array(asked["served"]), loads, COST)
    assert answer["gain"] == pytest.approx(before / modelled_step(served, loads, COST))
    assert answer["gain"] > 1.2
    # With the lanes that it proposes there is nothing to gain any more, unless one insists.
    assert propose({**asked, "served": served.tolist()})["plan"] is None
    again = propose({**asked, "served": served.tolist(), "forced": True})
    assert Plan.from_json(again["plan"]).layers == plan.layers


def test_the_process_answers_in_order_and_outlives_a_bad_question() -> None:
    answers: queue.Queue[dict[str, Any]] = queue.Queue()
    proposals = Proposals(answers.put)
    proposals.ask(question(1.0))
    assert proposals.busy
    first = answers.get(timeout=60)
    assert first["gain"] > 1.2 and not proposals.busy
    proposals.ask({"requests": [[[1.0]]]})
    assert "KeyError" in answers.get(timeout=60)["error"]
    proposals.ask(question(1.0))
    assert answers.get(timeout=60)["plan"] == first["plan"], "the same plan for the same traffic"
    process = proposals._process
    assert process is not None
    process.kill()
    process.wait()
    # Who asks neither works nor waits, whatever the size: arrays of more than a pipe holds, while
    # the process is not there yet, and while it does not read.
    big = question(1.0)
    big["requests"] = np.tile(np.array(big["requests"]), (40, 1, 1))
    spent: list[float] = []

    def ask() -> None:
        started = time.thread_time()  # not the clock: the machine may be busy
        proposals.ask(big)
        spent.append(time.thread_time() - started)

    ask()
    assert answers.get(timeout=60)["gain"] > 1.2
    process = proposals._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(60)
    assert proposals.busy and len(spent) == 2 and max(spent) < 0.1
    process.send_signal(signal.SIGCONT)
    assert answers.get(timeout=60)["gain"] > 1.2
    process = proposals._process
    assert process is not None and process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 0


def test_what_a_library_prints_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a process that does not answer is reported and replaced."""
    answers: queue.Queue[dict[str, Any]] = queue.Queue()
    proposals = Proposals(answers.put)
    monkeypatch.setattr(proposals_module.sys, "executable", "/bin/false")
    proposals.ask(question(1.0))
    assert "error" in answers.get(timeout=60) and not proposals.busy
    monkeypatch.undo()
    proposals.ask(question(1.0))
    assert answers.get(timeout=60)["gain"] > 1.2
    code = (
        "import sys, io; from fairkv_sglang.control import proposals as p;"
        "p.propose = lambda q: __import__('os').write(1, b'noise') and {'ok': q};"
        "sys.stdin = io.StringIO('[1]\\n'); p.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"ok": [1]} and "noise" in done.stderr


def test_any_valid_placement_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TEST_PLANS, "random")
    texts = {propose(question(0.0, forced=True))["plan"] for _ in range(20)}
    assert len(texts) > 1
    for text in texts:
        served = Plan.from_json(text).shares() > 0
        assert served.sum(axis=2).max() <= 5 and served.any(axis=1).all()

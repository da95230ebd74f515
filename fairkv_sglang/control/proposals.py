# SPDX-License-Identifier: Apache-2.0
"""Makes plans beside the server: a process of its own, so that no step waits for the planner.

    python -m fairkv_sglang.control.proposals

reads one JSON question a line and answers with one JSON line. It imports the planner only, no torch
and no SGLang, runs at the lowest priority, and ends when its input does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fairkv_sglang.placement import CostModel, Plan, make_plan
from fairkv_sglang.placement.lanes import modelled_step
from fairkv_sglang.profiles.change import since_change

GAIN = 1.02
"""A plan must be so much faster, by the model, than the best use of the lanes that there are."""

TEST_PLANS = "FAIRKV_TEST_PLANS"
"""Environment variable for tests: a plan file to propose instead of the best plan, as it is at the
time of the question, or ``random`` for any valid placement."""


def propose(question: dict[str, Any]) -> dict[str, Any]:
    """Answer one question.

    Args:
        question: ``requests [N][L][H]`` (kept tokens of the last prompts) and whether all prompts
            are ``alike`` (static budgets), ``served [L][R][H]`` (lanes now), ``slots`` and whether
            they are ``paid`` for when empty, ``policy``, ``cost`` (fields of
            :class:`CostModel`), ``max_copies``, ``model``, ``forced``.

    Returns:
        ``plan`` (JSON text, or None if the lanes are good enough), ``gain`` (modelled step now over
        that of the plan), ``requests`` (how many of the last ones it was made from), ``seconds``.
    """
    started = time.perf_counter()
    requests = np.asarray(question["requests"], dtype=np.float64)
    if not question["alike"]:
        requests = since_change(requests)
    loads = requests.mean(axis=0)
    served = np.asarray(question["served"], dtype=bool)
    cost = CostModel.model_validate(question["cost"])
    source = os.environ.get(TEST_PLANS)
    if source:
        plan, gain = _test_plan(source, served, question["slots"]), 1.0
    else:
        plan = make_plan(
            question["policy"],
            loads,
            served.shape[1],
            cost=cost,
            model=question["model"],
            max_copies_per_layer=question["max_copies"],
            samples=None if question["alike"] else requests,
            lanes=served,
            max_lanes=question["slots"],
            paid=question["paid"],
        )
        slots = question["slots"] if question["paid"] else None
        now = modelled_step(served, loads, cost, slots)
        gain = now / modelled_step(plan.shares() > 0, loads, cost, slots)
    wanted = question["forced"] or gain >= GAIN
    return {
        "requests": len(requests),
        "plan": plan.to_json() if wanted else None,
        "gain": gain,
        "seconds": time.perf_counter() - started,
    }


def _test_plan(source: str, served: np.ndarray[Any, Any], slots: int) -> Plan:
    """See :data:`TEST_PLANS`; a random placement has at most ``slots`` lanes on a rank."""
    if source != "random":
        return Plan.from_file(source)
    rng = np.random.default_rng()
    layers, ranks, heads = served.shape
    shares = np.zeros((layers, ranks, heads))
    for layer in shares:
        order = rng.permutation(ranks * min(slots, heads))
        for rank, head in zip(
            order % ranks, np.resize(rng.permutation(heads), heads), strict=False
        ):
            layer[rank, head] = 1.0
        for _ in range(int(rng.integers(0, ranks * slots))):
            rank, head = int(rng.integers(ranks)), int(rng.integers(heads))
            if layer[rank].sum() < slots:
                layer[rank, head] = 1.0
        for rank in np.flatnonzero(layer.sum(axis=1) == 0):
            layer[rank, int(rng.integers(heads))] = 1.0
    return Plan.from_shares(shares / shares.sum(axis=1, keepdims=True), "random")


class Proposals:
    """The planner's process, started with the first question.

    Args:
        answered: Called with each answer, on a thread of this object.
    """

    def __init__(self, answered: Callable[[dict[str, Any]], None]) -> None:
        self._answered = answered
        self._process: subprocess.Popen[str] | None = None
        self.busy = False

    def ask(self, question: dict[str, Any]) -> None:
        """Send a question; the one before must have been answered."""
        self.busy = True
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is the server's; this one ends with its input
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
            threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        stdin = self._process.stdin
        if stdin is not None:
            try:
                stdin.write(json.dumps(question) + "\n")
                stdin.flush()
            except OSError as error:  # it has ended: the thread that listens says so
                self._answered({"error": f"the planner's process has ended ({error})"})
                self.busy = False

    def _listen(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            self.busy = False
            self._answered(json.loads(line))
        if self.busy:
            self.busy = False
            self._answered({"error": f"the planner's process ended with {process.wait()}"})


def main() -> int:
    """Questions from standard input, answers to standard output."""
    os.nice(19)
    for line in sys.stdin:
        try:
            answer = propose(json.loads(line))
        except Exception as error:  # a server must outlive its planner
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

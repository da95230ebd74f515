# SPDX-License-Identifier: Apache-2.0
"""Makes plans beside the server: a process of its own, so that no step waits for the planner.

    python -m fairkv_sglang.control.proposals

reads one JSON question a line and answers with one JSON line. It imports the planner only, no torch
and no SGLang, runs at the lowest priority, and ends when its input does.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fairkv_sglang.placement import Plan, Planner
from fairkv_sglang.profiles.change import since_change

GAIN = 1.02
"""A plan must be so much faster, by the model, than the best use of the lanes that there are."""

TEST_PLANS = "FAIRKV_TEST_PLANS"
"""Environment variable for tests: a plan file to propose instead of the best plan, as it is at the
time of the question, or ``random`` for any valid placement."""


def propose(question: dict[str, Any]) -> dict[str, Any]:
    """Answer one question.

    Args:
        question: ``requests [N][L][H]`` (kept tokens of the last prompts), ``served [L][R][H]``
            (lanes now), ``planner`` (fields of :class:`Planner`), ``forced``.

    Returns:
        ``plan`` (JSON text, or None if the lanes are good enough), ``gain`` (modelled step now over
        that of the plan), ``requests`` (how many of the last ones it was made from), ``seconds``.
    """
    started = time.perf_counter()
    requests = _unpacked(question["requests"]).astype(np.float64)
    planner = Planner.model_validate(question["planner"])
    if planner.varies:
        requests = since_change(requests)
    served = _unpacked(question["served"]).astype(bool)
    source = os.environ.get(TEST_PLANS)
    if source:
        plan, gain = _test_plan(source, served, planner.slots or served.shape[2]), 1.0
    else:
        plan = planner.from_requests(requests, served)
        loads = requests.mean(axis=0)
        gain = planner.step(served, loads) / planner.step(plan.shares() > 0, loads)
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


def _packed(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """An array for JSON, quickly: the thread that does it holds the interpreter's lock."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"shape": array.shape, "type": array.dtype.str, "data": data}


def _unpacked(value: Any) -> np.ndarray[Any, Any]:
    if not isinstance(value, dict):
        return np.asarray(value)
    flat = np.frombuffer(base64.b64decode(value["data"]), dtype=value["type"])
    return flat.reshape(value["shape"])


class Proposals:
    """The planner's process and a thread that talks to it, so that nobody waits for either.

    Args:
        answered: Called with each answer, on the thread.
    """

    def __init__(self, answered: Callable[[dict[str, Any]], None]) -> None:
        self._answered = answered
        self._questions: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self.busy = False

    def start(self) -> None:
        """Start the process now, so that its imports do not run beside the first requests."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._talk, daemon=True)
            self._thread.start()

    def ask(self, question: dict[str, Any]) -> None:
        """Pass a question on; the one before must have been answered. Arrays may be numpy's."""
        self.busy = True
        self.start()
        self._questions.put(question)

    def _talk(self) -> None:
        with contextlib.suppress(OSError):  # the first question tries again, and says why
            self._process = self._spawn()
        while True:
            question = self._questions.get()
            try:
                answer = self._exchange(question)
            except Exception as error:  # a server must outlive its planner
                answer = {"error": f"{type(error).__name__}: {error}"}
                if self._process is not None:
                    self._process.kill()
                    self._process.wait()
                self._process = None
            self.busy = False
            self._answered(answer)

    def _spawn(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the server's; this one ends with its input
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def _exchange(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._process = self._spawn()
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the planner's process has no pipes")
        self._process.stdin.write(json.dumps(question, default=_packed) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the planner's process ended with {self._process.wait()}")
        return dict(json.loads(line))


def main() -> int:
    """Questions from standard input, answers to standard output."""
    os.nice(19)
    # Answers alone on the pipe: a library that prints, prints to the server's log.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = propose(json.loads(line))
        except Exception as error:  # a server must outlive its planner
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

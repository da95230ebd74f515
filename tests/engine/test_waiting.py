# SPDX-License-Identifier: Apache-2.0
"""Nobody waits for ever: not a preempted request, and not a paused server that is asked to stop."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairkv_tests.engine_process import ServerProcess
from fairkv_tests.plugin_folder import LINGER_PROBE, install_plugin
from fairkv_tests.tiny_models import random_prompts
from fairkv_tests.workloads import CHECKS, MODEL

PAGES = 560
"""The long prompt needs up to 528 pages, 12 more for its output, one that runs beside it 60."""
LOW, HIGH = 0, 5


class Asked(threading.Thread):
    """A streamed request: ``started`` at its first token, ``answer`` when it has ended."""

    def __init__(self, server: ServerProcess, prompt: list[int], new_tokens: int, priority: int):
        super().__init__(daemon=True)
        options = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        name = f"linger-0.01-{uuid.uuid4().hex}"
        body = {"rid": name, "input_ids": prompt, "sampling_params": options, "priority": priority}
        self.request = urllib.request.Request(
            server.url + "/generate",
            json.dumps(body | {"stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        self.started = threading.Event()
        self.answer: dict[str, Any] = {}
        self.start()

    def run(self) -> None:
        """Read to the end."""
        with urllib.request.urlopen(self.request, timeout=90) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    self.answer = json.loads(line.removeprefix(b"data: "))["meta_info"]
                    self.started.set()

    @property
    def tokens(self) -> int:
        """Tokens of the answer."""
        self.join(90)
        return int(self.answer.get("completion_tokens", 0))


@pytest.fixture(scope="module")
def server(
    start_server: Callable[..., ServerProcess],
    tiny_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ServerProcess:
    """Two requests at a time; a higher priority preempts."""
    probe = install_plugin(tmp_path_factory.mktemp("plugin"), "linger_probe", LINGER_PROBE)
    arguments = (
        f"--model-path {tiny_model(**MODEL)} --device cpu --dtype float32 --tp 2 --random-seed 1 "
        "--max-total-tokens 20000 --chunked-prefill-size 2048 --max-running-requests 2 "
        "--enable-priority-scheduling --priority-scheduling-preemption-threshold 1 "
        "--schedule-conservativeness 0.3 --fairkv --fairkv-ratio 0.25 --fairkv-replan off "
        f"--fairkv-prefill-pool 4000 --fairkv-arena-pages {PAGES}"
    )
    return start_server(arguments.split(), environment={**CHECKS, "PYTHONPATH": str(probe)})


def test_nobody_waits_for_ever(server: ServerProcess) -> None:
    """First a preempted request, then all that are there when a paused server is to stop."""
    urgent, *patient = random_prompts([1500, 300, 300], vocab=500, seed=8)
    assert Asked(server, urgent, 1, HIGH).tokens == 1  # its prefix is cached from now on
    low = [Asked(server, prompt, 300, LOW) for prompt in patient]
    assert all(asked.started.wait(60) for asked in low)
    # One of the two is preempted for it, and still it does not fit beside the other.
    assert Asked(server, urgent, 10, HIGH).tokens == 10
    assert [asked.tokens for asked in low] == [300, 300]
    assert sum(asked.answer["num_retractions"] for asked in low) == 1
    state = json.loads(server.get("/server_info"))["internal_states"][0]["fairkv"]
    assert [rank["pages_charged"] for rank in state["ranks"]] == [0, 0]

    running = Asked(server, patient[0], 300, LOW)
    assert running.started.wait(60)
    server.post_text("/pause_generation", {"mode": "in_place"})
    waiting = Asked(server, patient[1], 20, LOW)
    time.sleep(1)  # it has arrived, and waits for the pause to end
    server.process.terminate()
    server.process.wait(90)
    assert [running.tokens, waiting.tokens] == [300, 20]

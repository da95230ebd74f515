# SPDX-License-Identifier: Apache-2.0
"""Requests that stop SGLang's ranks, and the end of a server by Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from fairkv_tests.engine_process import ServerProcess
from fairkv_tests.workloads import BATCH, MODEL

SERVER = "--device cpu --dtype float32 --tp 2 --max-total-tokens 9000 --random-seed 1 --fairkv"
LONG = {"max_new_tokens": 1000, "ignore_eos": True}


def load(server: ServerProcess) -> list[dict[str, Any]]:
    """Requests that would run for a minute; the list gets what became of them."""
    ends: list[dict[str, Any]] = []

    def ask(prompt: list[int]) -> None:
        with contextlib.suppress(OSError):
            answer = server.post("/generate", {"input_ids": prompt, "sampling_params": LONG})
            ends.append(answer["meta_info"]["finish_reason"])

    for prompt in BATCH[5:12]:
        threading.Thread(target=ask, args=(prompt,), daemon=True).start()
    time.sleep(3)
    return ends


def status(server: ServerProcess, body: dict[str, Any]) -> int:
    """HTTP status of a request."""
    request = urllib.request.Request(
        server.url + "/generate",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


FATAL: list[dict[str, Any]] = [
    {"input_ids": [[]]},
    {
        "input_ids": [5, 6],
        "sampling_params": {"logit_bias": {"7": 3e38}, "temperature": 0.5, "top_p": 0.9},
    },
    {"input_ids": [5, 6], "return_logprob": True, "token_ids_logprob": [1_000_000]},
    {"input_ids": [5, 6], "return_logprob": True, "top_logprobs_num": [3]},
    {"input_ids": [5, 6], "sampling_params": {"logit_bias": [7]}},
    {"input_ids": [5, 6], "sampling_params": {"custom_params": {"other": [[1]]}}},
    {"input_ids": [5, 6], "sampling_params": {"skip_special_tokens": "yes"}},
    *(
        {"input_ids": [5, 6], "sampling_params": {"custom_params": {"fairkv": fairkv}}}
        for fairkv in (3, {"budgt": 64}, {"budget": 32}, {"ratio": 2}, {"protect": [[0, 3]]})
    ),
]
HARMLESS: list[dict[str, Any]] = [
    {"input_ids": [5, 6], "sampling_params": {"temperature": 1e-30, "max_new_tokens": 2}},
    {
        "input_ids": [5, 6],
        "sampling_params": {"logit_bias": {"7": -100}, "temperature": 2e-6, "max_new_tokens": 2},
    },
]


def test_ctrl_c_ends_a_server(
    tiny_model: Callable[..., Path], start_server: Callable[..., ServerProcess]
) -> None:
    """Within 10 s, whatever runs; all clients get an answer, and no process has a traceback."""
    server = start_server(["--model-path", str(tiny_model(**MODEL)), *SERVER.split()])
    assert [status(server, body) for body in FATAL] == [400] * len(FATAL)
    assert [status(server, body) for body in HARMLESS] == [200] * len(HARMLESS)
    ends = load(server)
    family = psutil.Process(server.process.pid).children(recursive=True)
    started = time.monotonic()
    os.killpg(server.process.pid, signal.SIGINT)  # a terminal sends it to all of them
    code = server.process.wait(20)
    seconds = time.monotonic() - started
    _, alive = psutil.wait_procs(family, timeout=2)
    assert alive == []
    assert code == 0, server.log
    assert seconds < 10
    assert "Traceback" not in server.log, server.log
    assert [end["type"] for end in ends] == ["abort"] * 7

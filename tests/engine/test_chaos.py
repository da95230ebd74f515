# SPDX-License-Identifier: Apache-2.0
"""Reliability: a storm of clients, and a rank that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from fairkv_tests.chaos import Chaos, start
from fairkv_tests.engine_process import ServerProcess
from fairkv_tests.workloads import BATCH, MODEL


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The server of the storm."""
    made = start(tmp_path_factory.mktemp("chaos"), overlap=True)
    yield made
    made.close()


def test_a_storm_leaves_nothing_behind(server: ServerProcess) -> None:
    """`make chaos` with a tenth of its requests."""
    found = asyncio.run(Chaos(server.url, requests=200, seed=1).run())
    assert found["equal witnesses"] >= 20
    assert found["retractions"] + found.get("retracted witnesses", 0) > 0
    assert server.process.poll() is None


def load(server: ServerProcess) -> list[threading.Thread]:
    """Requests that run for minutes, from clients that do not mind how they end."""

    def ask(prompt: list[int]) -> None:
        options = {"max_new_tokens": 1000, "ignore_eos": True}
        with contextlib.suppress(OSError):
            server.post("/generate", {"input_ids": prompt, "sampling_params": options})

    threads = [threading.Thread(target=ask, args=(p,), daemon=True) for p in BATCH[5:12]]
    for thread in threads:
        thread.start()
    time.sleep(3)
    return threads


def test_a_killed_rank_ends_the_server(
    tiny_model: Callable[..., Path], start_server: Callable[..., ServerProcess]
) -> None:
    """Within 30 s, with a line that names it, and without orphans."""
    arguments = (
        f"--model-path {tiny_model(**MODEL)} --device cpu --dtype float32 --tp 2 "
        "--max-total-tokens 9000 --random-seed 1 --fairkv"
    )
    server = start_server(arguments.split())
    load(server)
    family = psutil.Process(server.process.pid).children(recursive=True)
    rank = next(p for p in family if "scheduler_TP1" in " ".join(p.cmdline()))
    os.kill(rank.pid, signal.SIGKILL)
    server.process.wait(30)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert server.process.returncode != 0
    assert f"FairKV: rank 1 (process {rank.pid}) was killed (SIGKILL)" in server.log

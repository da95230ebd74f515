# SPDX-License-Identifier: Apache-2.0
"""Ranks that SGLang does not watch: of nodes without HTTP server, of replicas."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from fairkv_sglang.patches import watching


def children(*work: Callable[[], Any]) -> list[Any]:
    """Real processes, as SGLang has them."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=each) for each in work]
    for process in processes:
        process.start()
    return processes


def well() -> None:
    os._exit(0)


def badly() -> None:
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def long() -> None:
    time.sleep(60)


def test_all_ended_well() -> None:
    assert watching._first_failure(children(well, well)) is False


def test_one_that_fails_is_noticed_while_others_run() -> None:
    processes = children(well, long, badly)
    started = time.monotonic()
    assert watching._first_failure(processes) is True
    assert time.monotonic() - started < 30
    assert processes[2].exitcode == -signal.SIGKILL and processes[1].is_alive()
    processes[1].kill()
    processes[1].join()


def test_a_node_whose_rank_failed_names_it_and_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sglang.srt.utils.kill_process_tree", lambda *_, **__: None)
    monkeypatch.setattr(watching.signal, "signal", lambda *_: None)
    processes = children(badly)
    with pytest.raises(SystemExit) as ended:
        watching._wait(processes, ["scheduler_3"], 1)
    assert ended.value.code == 1
    assert f"rank 3 (process {processes[0].pid}) was killed (SIGKILL)" in caplog.text
    watching._wait(children(well), ["scheduler_3"], 1)  # node 0 has ended it

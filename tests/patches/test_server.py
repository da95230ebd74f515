# SPDX-License-Identifier: Apache-2.0
"""A server's first process: its port, its end, what a dead rank died of, requests."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from fairkv_sglang.config import ConfigError
from fairkv_sglang.patches import server
from fairkv_sglang.patches.requests import before_validate, check_request
from fairkv_sglang.patches.server import abort_requests, check_port, obituaries


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"--port {port}: the server cannot.*in use.*another port"
        ) as error:
            check_port("127.0.0.1", port, f"--port {port}: the server")
        assert "\n" not in str(error.value)
    check_port("127.0.0.1", port, "it")


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("203.0.113.1", 30_000)])
def test_an_address_that_cannot_be(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match="cannot listen there"):
        check_port(host, port, "it")


def test_who_died_and_of_what() -> None:
    codes = [None, -signal.SIGKILL, 0, -signal.SIGSEGV, 1]
    names = [*(f"scheduler_{rank}" for rank in range(4)), "detokenizer"]
    processes = [SimpleNamespace(pid=100 + i, exitcode=code) for i, code in enumerate(codes)]
    killed, crashed, failed = obituaries(zip(names, processes, strict=True))
    assert "rank 1 (process 101) was killed (SIGKILL)" in killed and "dmesg" in killed
    assert "rank 3 (process 103) was ended by SIGSEGV" in crashed
    assert "detokenizer (process 104) ended with status 1" in failed


class Loop:
    def __init__(self) -> None:
        self.later: list[Any] = []

    def call_later(self, *call: Any) -> None:
        self.later.append(call)


@pytest.mark.parametrize("running", [0, 3])
def test_requests_are_aborted_until_the_server_has_ended(
    running: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before SGLang is told to wait for nobody, clients get what was aborted first."""
    monkeypatch.setenv("SGL_FORCE_SHUTDOWN", "")  # put back afterwards
    aborted: list[bool] = []
    manager = SimpleNamespace(
        rid_to_state=dict.fromkeys(range(running)),
        event_loop=Loop(),
        abort_request=lambda abort_all: aborted.append(abort_all),
    )
    abort_requests(manager)
    assert aborted == [True] * bool(running)
    assert not os.environ["SGL_FORCE_SHUTDOWN"]
    [(seconds, function, *arguments)] = manager.event_loop.later
    assert seconds == 1.0
    function(*arguments)
    assert aborted == [True, True] * bool(running)
    assert os.environ["SGL_FORCE_SHUTDOWN"] == "1"
    assert len(manager.event_loop.later) == 2


@pytest.mark.parametrize(
    ("ids", "sampling", "words"),
    [
        ([], {}, "no tokens"),
        ([1], {"logit_bias": {"7": 3e38}}, "logit_bias of token 7"),
        ([1], {"logit_bias": {"7": math.nan}}, "logit_bias of token 7"),
        ([1], {"logit_bias": {"7": math.inf}}, "logit_bias of token 7"),
        ([1], {"logit_bias": {"7": "much"}}, "logit_bias of token 7"),
        ([1], {"logit_bias": [7]}, "logit_bias must map"),
        ([1], {"logit_bias": "7"}, "logit_bias must map"),
    ],
)
def test_requests_that_stop_ranks_are_refused(
    ids: list[int], sampling: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_request(ids, None, sampling)


def test_other_requests_pass() -> None:
    check_request([1], None, {"logit_bias": {"7": -100, "8": 100.0}, "temperature": 0})
    check_request([], [[0.5]], {})
    check_request(None, None, {})
    check_request([1], None, {"logit_bias": None})


@pytest.mark.parametrize("name", ["top_logprobs_num", "logprob_start_len"])
def test_lists_for_a_single_request_are_refused(name: str) -> None:
    """They are for batches; SGLang takes one for a single prompt, and its ranks compare it."""
    request = SimpleNamespace(sampling_params={}, top_logprobs_num=3, logprob_start_len=-1)
    before_validate(None, request, [1])
    setattr(request, name, [3])
    with pytest.raises(ValueError, match=rf"^{name} of a single request must be a number"):
        before_validate(None, request, [1])


class Manager:
    """SGLang's tokenizer manager: waits for SIGTERM, then for the last request."""

    def __init__(self, paused: bool, stopping: bool) -> None:
        self.is_pause, self.gracefully_exit = paused, stopping
        self.requests = 3

    async def continue_generation(self, request: object) -> None:
        self.is_pause = False

    async def sigterm_watchdog(self) -> None:
        while not self.gracefully_exit or self.requests:
            if not self.is_pause:
                self.requests = 0
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("paused", [False, True])
def test_a_paused_server_that_is_asked_to_stop_goes_on(paused: bool) -> None:
    manager = Manager(paused, stopping=True)
    ending = server.around_sigterm_watchdog(Manager.sigterm_watchdog, manager)
    asyncio.run(asyncio.wait_for(ending, 10))
    assert manager.requests == 0


def test_nobody_else_ends_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LOOK_SECONDS", 0.01)
    manager = Manager(paused=True, stopping=False)
    ending = server.around_sigterm_watchdog(Manager.sigterm_watchdog, manager)
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(ending, 0.2))
    assert manager.is_pause and manager.requests == 3

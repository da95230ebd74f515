# SPDX-License-Identifier: Apache-2.0
"""Prefill-decode disaggregation: two real servers on 127.0.0.1, between which kept rows go."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fairkv_tests.engine_process import EngineProcess, ServerProcess
from fairkv_tests.ports import free_port
from fairkv_tests.workloads import BATCH, CHECKS, ENGINE, KV_HEADS, LAYERS, MODEL, NEW_TOKENS

pytestmark = pytest.mark.skipif(
    version("sglang") != "0.5.21", reason="prefill-decode disaggregation runs on SGLang 0.5.21"
)
COMMON = (
    "--device cpu --dtype float32 --max-total-tokens 40000 --chunked-prefill-size 512 "
    "--random-seed 1 --fairkv --disaggregation-transfer-backend fairkv"
)
ROW_BYTES = 2 * 32 * 4
"""K and V of one head's token in the test's model, float32."""
Job = concurrent.futures.Future[Any]
ROOMS = iter(range(1, 1 << 30))


@dataclass
class Pair:
    """A prefill and a decode server."""

    prefill: ServerProcess
    decode: ServerProcess
    port: int

    def send(self, prompts: list[list[int]], new_tokens: int) -> list[Job]:
        """As a router does it: the same request to both, with rooms that they share.

        Returns:
            The answers to come, the prefill server's and the decode server's.
        """
        body = {
            "input_ids": prompts,
            "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
            "bootstrap_host": ["127.0.0.1"] * len(prompts),
            "bootstrap_port": [self.port] * len(prompts),
            "bootstrap_room": [next(ROOMS) for _ in prompts],
        }
        pool = concurrent.futures.ThreadPoolExecutor(2)
        return [pool.submit(s.post, "/generate", body) for s in (self.prefill, self.decode)]

    def ask(self, prompts: list[list[int]]) -> list[list[int]]:
        """Greedy tokens of all prompts, the first of each from the prefill server."""
        first, whole = (job.result() for job in self.send(prompts, NEW_TOKENS))
        tokens = [answer["output_ids"] for answer in whole]
        assert [answer["output_ids"] for answer in first] == [t[:1] for t in tokens]
        return tokens

    def close(self) -> None:
        """Stop both: the ranks of a server that has nothing to do take a core each."""
        for server in (self.prefill, self.decode):
            server.close()


def failed(job: Job) -> str:
    """What an answer to a request says that has failed."""
    try:
        return str(job.result()[0]["meta_info"]["finish_reason"])
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except OSError:
        return "no answer"


def state(server: ServerProcess) -> dict[str, Any]:
    """FairKV's state."""
    return dict(json.loads(server.get("/server_info"))["internal_states"][0]["fairkv"])


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_decoding(server: ServerProcess) -> bool:
    """Some request has its rows."""
    return any(rank["tokens_stored"] for rank in state(server)["ranks"])


def is_empty(server: ServerProcess) -> bool:
    """No rank holds a head page or a row; SGLang's strict checks have looked at idle."""
    ranks = state(server)["ranks"]
    held = ("pages_used", "pages_charged", "requests", "pool_tokens_held")
    return not any(rank[name] for rank in ranks for name in held)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(**MODEL)


@pytest.fixture(scope="module")
def of_one_server(
    model: Path, start_engine: Callable[..., EngineProcess]
) -> tuple[list[list[int]], int]:
    """Tokens of the batch, and how many tokens its prompts keep."""
    one = start_engine(model, fairkv={"ratio": 0.25}, **ENGINE)
    before = one.fairkv()["kept_tokens"]
    outputs = one.generate(BATCH, NEW_TOKENS)
    kept = one.fairkv()["kept_tokens"] - before
    one.close()
    return outputs, kept


@pytest.fixture(scope="module")
def start_one(
    start_server: Callable[..., ServerProcess], model: Path
) -> Callable[..., ServerProcess]:
    """``start_one("prefill", port, "--fairkv-ratio 0.25")``."""

    def start(mode: str, port: int, flags: str) -> ServerProcess:
        line = (
            f"--model-path {model} {COMMON} --disaggregation-bootstrap-port {port} "
            f"--disaggregation-mode {mode} {flags}"
        )
        return start_server(line.split(), environment=CHECKS)

    return start


@pytest.fixture(scope="module")
def start_pair(start_one: Callable[..., ServerProcess]) -> Callable[..., Pair]:
    """``start_pair(1, 2)``: servers of so many ranks; the same pair for the same numbers."""
    pairs: dict[tuple[int, int], Pair] = {}

    def start(prefill: int, decode: int) -> Pair:
        if (prefill, decode) not in pairs:
            port = free_port()
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                jobs = [
                    pool.submit(start_one, mode, port, f"--fairkv-ratio 0.25 --tp {ranks}")
                    for mode, ranks in (("prefill", prefill), ("decode", decode))
                ]
                pairs[prefill, decode] = Pair(*(job.result() for job in jobs), port)
        return pairs[prefill, decode]

    return start


@pytest.mark.sweep
@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_answers_of_one_server_for_a_quarter_of_the_bytes(
    of_one_server: tuple[list[list[int]], int],
    start_pair: Callable[..., Pair],
    ranks: tuple[int, int],
) -> None:
    """Any number of ranks on either side; nothing is left behind."""
    wanted, kept = of_one_server
    pair = start_pair(*ranks)
    assert state(pair.prefill)["placement"] == "contiguous"
    assert pair.ask(BATCH) == wanted
    assert state(pair.prefill)["kept_tokens"] == kept
    assert pair.ask(BATCH[10:12]) == wanted[10:12]  # prefixes are cached on the prefill side
    until(lambda: is_empty(pair.prefill) and is_empty(pair.decode))

    sent = sum(rank["moved_bytes"] for rank in state(pair.prefill)["ranks"])
    got = sum(rank["moved_bytes"] for rank in state(pair.decode)["ranks"])
    assert sent == got == state(pair.prefill)["kept_tokens"] * ROW_BYTES
    whole = sum(map(len, [*BATCH, *BATCH[10:12]])) * LAYERS * KV_HEADS * ROW_BYTES
    assert sent < 0.3 * whole
    if ranks != (1, 1):  # which the tests below use, too
        pair.close()


@pytest.mark.sweep
@pytest.mark.skipif(
    find_spec("sglang_router") is None,
    reason="needs pip install --no-deps -r requirements/router.txt",
)
def test_behind_the_router(
    start_pair: Callable[..., Pair], start_server: Callable[..., ServerProcess]
) -> None:
    """SGLang's router sends each request to both servers and gives the decode server's answer."""
    pair = start_pair(1, 1)
    wanted = pair.ask(BATCH[4:])
    flags = (
        f"--pd-disaggregation --prefill {pair.prefill.url} {pair.port} --decode {pair.decode.url} "
        f"--prometheus-host 127.0.0.1 --prometheus-port {free_port()}"
    )
    router = start_server(flags.split(), module="sglang_router.launch_router")

    def ask(prompt: list[int]) -> list[int]:
        sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling}
        return list(router.post("/generate", body)["output_ids"])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, BATCH[4:])) == wanted
    until(lambda: is_empty(pair.prefill) and is_empty(pair.decode))


@pytest.mark.sweep
def test_what_ends_early_leaves_nothing(
    start_pair: Callable[..., Pair], start_one: Callable[..., ServerProcess]
) -> None:
    """Aborted on either side, a prefill server that is killed, one that was started otherwise."""
    pair = start_pair(1, 1)
    wanted = pair.ask(BATCH[12:14])
    for server in (pair.decode, pair.prefill):
        jobs = pair.send(BATCH[8:], 1500)
        if server is pair.decode:
            until(lambda: is_decoding(pair.decode))
        server.post_text("/abort_request", {"abort_all": True})
        if server is pair.prefill:  # some had their rows
            time.sleep(1)
            pair.decode.post_text("/abort_request", {"abort_all": True})
        assert "abort" in failed(jobs[1]).lower()
        failed(jobs[0])
        until(lambda: is_empty(pair.prefill) and is_empty(pair.decode))
        assert pair.ask(BATCH[12:14]) == wanted

    jobs = pair.send(BATCH[8:], 2)
    until(lambda: state(pair.prefill)["ranks"][0]["requests"] > 0)
    os.killpg(pair.prefill.process.pid, signal.SIGKILL)
    assert "is gone" in failed(jobs[1])
    until(lambda: is_empty(pair.decode))

    pair.prefill = start_one("prefill", pair.port, "--fairkv-ratio 0.5 --tp 1")
    lines = [failed(job) for job in pair.send(BATCH[12:14], 8)]
    line = (
        "FairKV was started otherwise on this decode server than on the prefill server "
        f"127.0.0.1:{pair.port}: budget '25% of the prompt' instead of '50% of the prompt'; "
        "give both the same model, budget, scorer and scope"
    )
    assert all(line in each for each in lines), lines
    until(lambda: is_empty(pair.prefill) and is_empty(pair.decode))
    assert all("Traceback" not in server.log for server in (pair.prefill, pair.decode))

# SPDX-License-Identifier: Apache-2.0
"""More than one machine: nodes of one server, replicas behind SGLang's controller, servers behind
SGLang's router. All of it on 127.0.0.1, in as many real processes as on so many machines.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from fairkv_tests.engine_process import EngineProcess, ServerProcess
from fairkv_tests.ports import free_port
from fairkv_tests.workloads import BATCH, ENGINE, MODEL, NEW_TOKENS, write_profile

COMMON = (
    "--device cpu --dtype float32 --max-total-tokens 40000 --chunked-prefill-size 512 "
    "--random-seed 1 --fairkv --fairkv-ratio 0.25"
)
PROMPTS = BATCH[3:14]
LONG = {"temperature": 0, "max_new_tokens": 1000, "ignore_eos": True}
Nodes = list[ServerProcess]
StartNodes = Callable[..., Nodes]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    """The model of all servers."""
    return tiny_model(**MODEL)


@pytest.fixture
def start_nodes(start_server: Callable[..., ServerProcess], model: Path) -> StartNodes:
    """``start_nodes("--tp 2", ("", "--flag-of-node-1"))``: one server of two nodes."""

    def start(arguments: str, of_node: tuple[str, str] = ("", ""), **options: Any) -> Nodes:
        address = f"127.0.0.1:{free_port()}"
        lines = [
            f"--model-path {model} --nnodes 2 --node-rank {node} --dist-init-addr {address} "
            f"{arguments} {more}"
            for node, more in enumerate(of_node)
        ]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(start_server, line.split(), **options) for line in lines]
        return [job.result() for job in jobs]

    return start


def answers(server: ServerProcess) -> list[list[int]]:
    """Greedy tokens of all prompts in one batch."""
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    results = server.post("/generate", {"input_ids": PROMPTS, "sampling_params": sampling})
    return [result["output_ids"] for result in results]


def states(server: ServerProcess) -> list[dict[str, Any]]:
    """FairKV's state of each replica, which answer in any order."""
    internal = json.loads(server.get("/server_info"))["internal_states"]
    found = sorted((state["fairkv"] for state in internal), key=lambda state: state["replica"])
    assert [state["replica"] for state in found] == list(range(len(found)))
    return found


def loads(server: ServerProcess) -> list[dict[str, Any]]:
    """What SGLang tells routers, of each replica."""
    return list(json.loads(server.get("/v1/loads"))["loads"])


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def run_in_background(server: ServerProcess, prompts: list[list[int]]) -> None:
    """Requests that run for a minute, from clients that do not mind how they end."""

    def ask(prompt: list[int]) -> None:
        with contextlib.suppress(OSError):
            server.post("/generate", {"input_ids": prompt, "sampling_params": LONG})

    for prompt in prompts:
        threading.Thread(target=ask, args=(prompt,), daemon=True).start()


def family(nodes: Nodes) -> list[psutil.Process]:
    """All processes of the nodes."""
    parents = [psutil.Process(node.process.pid) for node in nodes]
    return parents + [child for p in parents for child in p.children(recursive=True)]


def replan(server: ServerProcess) -> None:
    """Ask for a new plan now and wait until it is adopted everywhere."""
    before = [state["replans"] for state in states(server)]
    answer = server.post("/set_internal_state", {"server_args": {"fairkv_replan": 1}})
    assert answer == [True] * len(before)
    until(lambda: [state["replans"] for state in states(server)] == [n + 1 for n in before])


def free_head_pages_are_told(server: ServerProcess) -> None:
    """While requests decode, the load is that of their head pages; the prefill pool is empty."""

    def busy() -> list[dict[str, Any]]:
        """Ranks of the replica with a request that is past its prompt."""
        for state in states(server):
            first = state["ranks"][0]
            if first["requests"] and not first["pool_tokens_held"]:
                return list(state["ranks"])
        return []

    run_in_background(server, [PROMPTS[7]])
    until(lambda: bool(busy()))

    def usage_is_what_ranks_hold() -> bool:
        """SGLang tells its load every few steps, and both are asked one after the other.

        It is that of the rank with least room for a token of mean budget, or of a fuller one as far
        as that bounds what fits (``control/load.py``).
        """
        held = [rank["pages_charged"] / rank["pages"] for rank in busy()]
        told = max(load["token_usage"] for load in loads(server))
        return bool(held) and 0 < 0.75 * min(held) <= told <= 1.25 * max(held)

    until(usage_is_what_ranks_hold)
    load = max(loads(server), key=lambda load: load["num_used_tokens"])
    assert load["num_used_tokens"] <= load["num_total_tokens"] < load["max_total_num_tokens"]
    server.post_text("/abort_request", {"abort_all": True})
    until(lambda: all(load["num_used_tokens"] == 0 for load in loads(server)))


def test_two_nodes_answer_as_one(
    start_engine: Callable[..., EngineProcess],
    start_nodes: StartNodes,
    model: Path,
    tmp_path: Path,
) -> None:
    """One plan with copies on all nodes, the same tokens, before and after a new plan; both end."""
    profile = write_profile(tmp_path)
    one = start_engine(model, fairkv={"ratio": 0.25, "profile": profile}, tp_size=2, **ENGINE)
    digest, wanted = one.fairkv()["plan_digest"], one.generate(PROMPTS, NEW_TOKENS)
    one.close()

    nodes = start_nodes(
        f"{COMMON} --tp 2 --fairkv-profile {profile} --enable-metrics",
        environment={"FAIRKV_TEST_PLANS": "random"},
    )
    processes = family(nodes)
    assert answers(nodes[0]) == wanted
    state = states(nodes[0])[0]
    assert state["plan_digest"] == digest and state["copies"] > 0
    assert state["balancedness_planned"] > 0.95
    assert state["decisions_agree"] and [rank["rank"] for rank in state["ranks"]] == [0, 1]
    for rank, node in enumerate(nodes):
        metrics = node.get("/metrics")
        assert "sglang:fairkv_head_pages_total{" in metrics
        assert f'tp_rank="{rank}"' in metrics and f'tp_rank="{1 - rank}"' not in metrics
    free_head_pages_are_told(nodes[0])
    replan(nodes[0])
    assert states(nodes[0])[0]["plan"]["policy"] == "random"
    assert answers(nodes[0]) == wanted

    for node in nodes:
        node.process.terminate()
    assert [node.process.wait(40) for node in nodes] == [0, 0], nodes[1].log
    _, alive = psutil.wait_procs(processes, timeout=2)
    assert alive == []
    assert all("Traceback" not in node.log for node in nodes)


@pytest.mark.sweep
def test_nodes_that_were_given_something_else_say_so(
    start_nodes: StartNodes, tmp_path: Path
) -> None:
    """Before a model is loaded, on every node, in one line."""
    profile = f"--fairkv-profile {write_profile(tmp_path)}"
    line = (
        r"(?s)error: FairKV was started otherwise on node 1 than on node 0: ratio 0.5 instead of "
        "0.25, profile none instead of file [0-9a-f]+; give every node the same FairKV flags "
        "and the same files\n(?!.*Traceback)"
    )
    with pytest.raises(AssertionError, match=line):
        start_nodes(f"{COMMON} --tp 2", (profile, "--fairkv-ratio 0.5"))


@pytest.mark.sweep
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_all_nodes(start_nodes: StartNodes, killed: int) -> None:
    """Within 30 s, with an error; the node of the rank names it."""
    nodes = start_nodes(f"{COMMON} --tp 2")
    run_in_background(nodes[0], PROMPTS)
    time.sleep(3)
    processes = family(nodes)
    rank = next(p for p in processes if f"scheduler_TP{killed}" in " ".join(p.cmdline()))
    os.kill(rank.pid, signal.SIGKILL)
    codes = [node.process.wait(30) for node in nodes]
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert alive == []
    assert 0 not in codes
    line = f"FairKV: rank {killed} (process {rank.pid}) was killed (SIGKILL)"
    assert line in nodes[killed].log
    assert "FairKV: node 1 ends, as a rank of the server has failed" in nodes[1].log


@pytest.mark.sweep
def test_ctrl_c_on_node_1_waits_for_node_0(start_nodes: StartNodes) -> None:
    nodes = start_nodes(f"{COMMON} --tp 2")
    processes = family(nodes)
    os.killpg(nodes[1].process.pid, signal.SIGINT)
    until(lambda: "FairKV: Ctrl-C: node 1 ends when node 0 does" in nodes[1].log)
    assert len(answers(nodes[0])) == len(PROMPTS)
    os.killpg(nodes[0].process.pid, signal.SIGINT)
    assert [node.process.wait(20) for node in nodes] == [0, 0], nodes[1].log
    _, alive = psutil.wait_procs(processes, timeout=2)
    assert alive == []
    assert all("Traceback" not in node.log for node in nodes)


@pytest.mark.sweep
@pytest.mark.parametrize("tp_size", [1, 2])
def test_replicas(start_server: Callable[..., ServerProcess], model: Path, tp_size: int) -> None:
    """Each replica has its book and its plan; one whose rank is killed ends the server."""
    server = start_server(
        f"--model-path {model} {COMMON} --tp {tp_size} --dp-size 2 --load-balance-method "
        "total_tokens --enable-metrics".split(),
        environment={"FAIRKV_TEST_PLANS": "random"},
    )
    wanted = answers(server)
    before = states(server)
    assert len(before) == len(loads(server)) == 2
    assert all(state["compactions"] > 0 and state["decisions_agree"] for state in before)
    assert all(len(state["ranks"]) == tp_size for state in before)
    labels = re.findall(r"sglang:fairkv_head_pages_total{(.*?)}", server.get("/metrics"))
    assert {n for n in "01" for line in labels if f'dp_rank="{n}"' in line} == {"0", "1"}
    if tp_size > 1:
        replan(server)
        plans = [state["plan_digest"] for state in states(server)]
        assert len(set(plans)) == 2  # drawn at random, by each for itself
    assert answers(server) == wanted
    free_head_pages_are_told(server)

    processes = family([server])
    run_in_background(server, PROMPTS)
    time.sleep(2)
    title = f"DP1_TP{tp_size - 1}" if tp_size > 1 else "DP1"
    rank = next(p for p in processes if f"scheduler_{title}" in " ".join(p.cmdline()))
    os.kill(rank.pid, signal.SIGKILL)
    server.process.wait(30)
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert alive == []
    assert server.process.returncode != 0
    if tp_size == 1:
        assert f"(process {rank.pid}) was killed (SIGKILL)" in server.log
        assert f"FairKV: rank {title}" in server.log
    else:  # its peer's error ends the controller of replicas, often before that sees who was killed
        assert "so the server ends" in server.log


def healthy(router: ServerProcess) -> set[str]:
    """Addresses of the servers that the router holds for healthy."""
    workers = json.loads(router.get("/workers"))["workers"]
    return {worker["url"] for worker in workers if worker["is_healthy"]}


@pytest.mark.sweep
@pytest.mark.skipif(
    find_spec("sglang_router") is None,
    reason="needs pip install --no-deps -r requirements/router.txt",
)
def test_router_goes_on_without_a_killed_server(
    start_server: Callable[..., ServerProcess], model: Path
) -> None:
    """Cache-aware: prompts go where their beginning is cached; all are answered, as by a server."""
    line = f"--model-path {model} {COMMON} --tp 1".split()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        servers = list(pool.map(lambda _: start_server(line), range(2)))
    flags = (
        "--policy cache_aware --prometheus-host 127.0.0.1 --health-check-interval-secs 1 "
        f"--health-failure-threshold 1 --prometheus-port {free_port()} --worker-urls"
    )
    router = start_server(
        [*flags.split(), *(s.url for s in servers)], module="sglang_router.launch_router"
    )
    until(lambda: healthy(router) == {server.url for server in servers})

    def ask(server: ServerProcess, number: int) -> Any:
        text = f"The story of number {number % 4} begins like this. " * 12 + f"Part {number}:"
        sampling = {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}
        return server.post("/generate", {"text": text, "sampling_params": sampling})

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = list(pool.map(lambda n: ask(router, n), range(16)))
        assert sum(answer["meta_info"]["cached_tokens"] > 0 for answer in first) >= 8
        assert all(states(server)[0]["compactions"] > 0 for server in servers)
        wanted = [answer["text"] for answer in first]
        later = [pool.submit(ask, router, number % 16) for number in range(48)]
        until(lambda: sum(job.done() for job in later) >= 8)
        os.killpg(servers[0].process.pid, signal.SIGKILL)
        texts = [job.result(60)["text"] for job in later]
    assert texts == wanted * 3
    until(lambda: healthy(router) == {servers[1].url})

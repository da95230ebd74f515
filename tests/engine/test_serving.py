# SPDX-License-Identifier: Apache-2.0
"""What users of SGLang do runs against a server of ``launch.py`` with FairKV."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fairkv_sglang.control.metrics import METRICS, PREFIX
from fairkv_tests.engine_process import ServerProcess
from fairkv_tests.tiny_models import random_prompts
from fairkv_tests.workloads import MODEL

STABLE = {
    "enabled", "scorer", "scope", "placement", "rank", "head_pages_total", "head_pages_used",
    "kept_tokens", "prompt_tokens", "compactions", "balancedness", "rank_loads", "replans",
    "plan_digest", "plan_source", "plan", "balancedness_planned",
}  # fmt: skip
"""Keys of ``fairkv`` in each internal state that users may rely on."""


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    """The model that is served."""
    return tiny_model(**MODEL)


@pytest.fixture(scope="module")
def server(start_server: Callable[..., ServerProcess], model: Path) -> ServerProcess:
    """TP 2, a quarter of the cache."""
    arguments = (
        f"--model-path {model} --device cpu --dtype float32 --tp 2 --max-total-tokens 30000 "
        "--enable-metrics --served-model-name tiny --fairkv --fairkv-ratio 0.25 --random-seed 1"
    )
    return start_server(arguments.split())


def _fairkv(server: ServerProcess) -> dict[str, Any]:
    states = json.loads(server.get("/server_info"))["internal_states"]
    return dict(states[0]["fairkv"])


def _metrics(server: ServerProcess) -> dict[str, dict[str, float]]:
    """FairKV's series by the Prometheus client's own parser: name -> rank -> value."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(server.get("/metrics")):
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                name = sample.name.removeprefix(PREFIX)
                found.setdefault(name, {})[sample.labels["tp_rank"]] = sample.value
    return found


def test_bench_serving(server: ServerProcess, model: Path, tmp_path: Path) -> None:
    """SGLang's benchmark client, all requests answered."""
    pytest.importorskip("datasets", reason="sglang.bench_serving imports it")
    before = _fairkv(server)
    result = subprocess.run(
        [
            sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang",
            "--base-url", server.url, "--dataset-name", "random-ids",
            "--model", "tiny", "--tokenizer", str(model),
            "--random-input-len", "400", "--random-output-len", "16",
            "--random-range-ratio", "0.5", "--num-prompts", "16", "--max-concurrency", "8",
            "--output-file", str(tmp_path / "bench.jsonl"),
        ],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    measured = json.loads((tmp_path / "bench.jsonl").read_text().splitlines()[-1])
    assert measured["completed"] == 16
    after = _fairkv(server)
    assert after["compactions"] - before["compactions"] >= 16
    assert after["kept_tokens"] < 0.5 * after["prompt_tokens"] * MODEL["layers"] * MODEL["kv_heads"]


def test_sglang_program_with_fork_and_select(server: ServerProcess) -> None:
    """SGLang's frontend language."""
    import sglang as sgl

    @sgl.function
    def program(s: Any, words: str) -> None:
        s += f"Some words: {words}. " * 8
        branches = s.fork(3)
        for index, branch in enumerate(branches):
            branch += f"Part {index}:"
            branch += sgl.gen("part", max_tokens=8, temperature=0)
        s += "Parts: " + ", ".join(str(branch["part"]) for branch in branches)
        s += "The best is " + sgl.select("best", choices=["one", "two", "three"])
        s += sgl.gen("rest", max_tokens=8, temperature=0)

    backend = sgl.RuntimeEndpoint(server.url)
    states = program.run_batch(
        [{"words": "red green blue"}, {"words": "north south"}], backend=backend, num_threads=2
    )
    for state in states:
        assert state["best"] in ("one", "two", "three")
        assert state.get_meta_info("rest")["completion_tokens"] == 8
    alone = program.run(words="north south", backend=backend)
    assert alone.text() == states[1].text()


def test_openai_client(server: ServerProcess) -> None:
    """Completions and chat, whole and as a stream."""
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0}
    prompt = "a long enough prompt, " * 20
    whole = client.completions.create(prompt=prompt, **options)
    assert whole.usage is not None and whole.usage.completion_tokens >= 1
    stream = client.completions.create(prompt=prompt, stream=True, **options)
    assert "".join(part.choices[0].text for part in stream) == whole.choices[0].text
    messages: Any = [{"role": "user", "content": prompt}]
    chat = client.chat.completions.create(messages=messages, **options)
    parts = client.chat.completions.create(messages=messages, stream=True, **options)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == chat.choices[0].message.content


def test_openai_client_with_options_of_its_own(server: ServerProcess) -> None:
    """As the client sends what SGLang adds to OpenAI's interface; what is wrong gets status 400."""
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "a long enough prompt, " * 20}]

    def chat(**fairkv: Any) -> tuple[int, int]:
        """Prompt tokens, and tokens that were kept of them."""
        before = _fairkv(server)["kept_tokens"]
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=4, temperature=0,
            extra_body={"custom_params": {"fairkv": fairkv}},
        )  # fmt: skip
        assert answer.usage is not None
        kept = _fairkv(server)["kept_tokens"] - before
        return answer.usage.prompt_tokens, kept // (MODEL["layers"] * MODEL["kv_heads"])

    length, kept = chat(budget=40)
    assert kept == 40 < length
    assert chat(compress=False) == (length, length)
    assert chat(ratio=0.5) == (length, -(-length // 2))
    with pytest.raises(openai.BadRequestError, match=r"fairkv\.budget: 32 tokens are too few"):
        chat(budget=32)
    messages.insert(0, {"role": "system", "content": "s" * 99})
    # The system prompt, here 99 bytes and the template's line feed, is more than the budget.
    length, kept = chat(budget=40)
    assert kept == 99 + 1 + 32 + 1
    assert chat(ratio=0.5) == (length, -(-length // 2))
    completion = client.completions.create(
        model="tiny", prompt="some words " * 40, max_tokens=4,
        extra_body={"custom_params": {"fairkv": {"ratio": 0.5, "protect": [[0, 9]]}}},
    )  # fmt: skip
    assert completion.choices[0].finish_reason == "length"
    state = _fairkv(server)
    assert state["decisions_agree"] and state["enabled"]


def test_server_info_says_what_is_on(server: ServerProcess) -> None:
    """The stable names, all ranks, all hooks."""
    state = _fairkv(server)
    assert set(state) >= STABLE
    assert state["enabled"] is True and state["decisions_agree"] is True
    assert (state["scorer"], state["scope"], state["rank"]) == ("snapkv", "layer", 0)
    assert state["placement"] == "fair_copying"
    assert (state["decode_backend"], state["profile"], state["window"]) == ("numba", None, 32)
    assert state["plan"]["num_layers"] == MODEL["layers"] and len(state["plan_digest"]) == 32
    assert state["budget"] == "25% of the prompt"
    assert [rank["rank"] for rank in state["ranks"]] == [0, 1]
    assert state["ranks"][0]["hooks"] == state["ranks"][1]["hooks"] > 20
    assert state["head_pages_total"] == state["ranks"][0]["pages"] > 0
    assert 0 < state["balancedness"] <= 1 and len(state["rank_loads"]) == 2
    assert server.log.count("FairKV on: scorer snapkv, scope layer") == 2  # each rank's log line
    assert server.log.count("FairKV: KV memory of rank") == 2


def test_metrics_of_both_ranks(server: ServerProcess) -> None:
    """Every gauge, per rank, and the same numbers as in the info endpoint."""
    prompt = random_prompts([300], vocab=500, seed=9)[0]
    server.post(
        "/generate",
        {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 60}},
    )
    deadline = time.monotonic() + 10  # metrics are refreshed once a second, at idle too
    while True:
        metrics, state = _metrics(server), _fairkv(server)
        wanted = {
            "head_pages_total": [rank["pages"] for rank in state["ranks"]],
            "compressions_total": [state["compactions"]] * 2,
            "kept_tokens_total": [state["kept_tokens"]] * 2,
            "handed_over_bytes_total": [rank["hand_over_bytes"] for rank in state["ranks"]],
            "running_requests": [0, 0],
            "rank_load_tokens": [0, 0],
        }
        found = {name: [metrics[name]["0"], metrics[name]["1"]] for name in wanted}
        if found == wanted or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert found == wanted and state["compactions"] > 0
    assert set(metrics) == {
        metric.name + ("_total" if metric.kind == "counter" else "") for metric in METRICS
    }
    assert all(set(ranks) == {"0", "1"} for ranks in metrics.values())


def test_profiling_leaves_a_trace_of_each_rank(server: ServerProcess, tmp_path: Path) -> None:
    """Torch's profiler, with the kinds of activity that SGLang's client asks for."""
    options = {"output_dir": str(tmp_path), "activities": ["CPU", "GPU"]}
    server.post_text("/start_profile", options)
    server.post("/generate", {"text": "hello " * 40, "sampling_params": {"max_new_tokens": 4}})
    server.post_text("/stop_profile", {})
    assert len(list(tmp_path.rglob("*.trace.json.gz"))) == 2
    assert "fairkv" in server.get("/server_info")


def test_flush_cache_gives_the_pool_back(server: ServerProcess) -> None:
    """And the answer afterwards is the same."""
    prompt = random_prompts([500], vocab=500, seed=10)[0]
    request = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True},
    }
    first = server.post("/generate", request)
    again = server.post("/generate", request)
    assert again["meta_info"]["cached_tokens"] > 400
    assert "Cache flushed" in server.get("/flush_cache?timeout=30")
    fresh = server.post("/generate", request)
    assert fresh["meta_info"]["cached_tokens"] == 0
    assert first["output_ids"] == again["output_ids"] == fresh["output_ids"]
    assert server.process.poll() is None


@pytest.mark.sweep
def test_offline_throughput(model: Path, tmp_path: Path) -> None:
    """SGLang's offline benchmark takes the flags."""
    result = subprocess.run(
        [
            sys.executable, "-m", "sglang.benchmark.offline_throughput", "--model-path", str(model),
            "--dataset-name", "random-ids", "--num-prompts", "8", "--random-input-len", "300",
            "--random-output-len", "8", "--random-range-ratio", "1.0", "--device", "cpu",
            "--dtype", "float32", "--max-total-tokens", "20000", "--fairkv", "--fairkv-ratio",
            "0.25", "--result-filename", str(tmp_path / "result.jsonl"),
        ],
        capture_output=True, text=True, timeout=400, check=False, env={**os.environ},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "result.jsonl").read_text())["successful_requests"] == 8
    assert "FairKV on" in result.stderr + result.stdout

# SPDX-License-Identifier: Apache-2.0
"""SGLang's own throughput benchmarks run with FairKV, commands unchanged, and say that it is on.

``bench_serving`` is a client of a running server: ``test_serving.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fairkv_tests.ports import free_port

MODEL = {"layers": 2, "q_heads": 4, "kv_heads": 2, "vocab": 10_240}  # ids of one_batch: < 10,000
ON = re.compile(r"FairKV on: scorer snapkv, scope \w+, budget 48 tokens .*rank 0 serves \d+ lanes")


@pytest.fixture(scope="module")
def launch(tiny_model: Callable[..., Path]) -> list[str]:
    """SGLang's arguments of all of them."""
    model = tiny_model(**MODEL)
    line = f"--model-path {model} --device cpu --dtype float32 --max-total-tokens 6000"
    return [*line.split(), "--random-seed", "1"]


def run(module: str, *arguments: str, folder: Path, **environment: str) -> str:
    """What ``python -m module`` writes; it ends well and leaves no process behind."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        cwd=folder,
        text=True,
        start_new_session=True,
    )
    try:
        log, _ = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, log
    assert "Traceback" not in log, log
    return log


def test_offline_throughput_by_flags(launch: list[str], tmp_path: Path) -> None:
    """Its arguments are read before it loads plugins."""
    turns = [{"value": "a question of some length " * 4}, {"value": "an answer " * 4}]
    data = tmp_path / "dialogues.json"
    data.write_text(json.dumps([{"conversations": turns}] * 20))
    log = run(
        "sglang.benchmark.offline_throughput", *launch,
        "--dataset-name", "random", "--dataset-path", str(data), "--num-prompts", "4",
        "--random-input-len", "80", "--random-output-len", "8", "--random-range-ratio", "1.0",
        "--fairkv", "--fairkv-budget", "48",
        folder=tmp_path,
    )  # fmt: skip
    assert ON.search(log), log
    assert re.search(r"Successful requests: +4", log), log


ONE_BATCH = ("--batch-size", "2", "--input-len", "80", "--output-len", "4")


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("ranks", "by_file"), [(2, True), (1, False)], ids=["tp2-file", "tp1-flags"]
)
def test_one_batch(launch: list[str], tmp_path: Path, ranks: int, by_file: bool) -> None:
    """It has no scheduler; its ranks load no plugins, and at TP 1 run in the parent itself."""
    config = tmp_path / "fairkv.yaml"
    config.write_text("budget: 48\n")
    log = run(
        "sglang.benchmark.one_batch", *launch, *ONE_BATCH, "--tp-size", str(ranks),
        *([] if by_file else ["--fairkv", "--fairkv-budget", "48"]),
        folder=tmp_path,
        **({"FAIRKV_CONFIG": str(config)} if by_file else {}),
    )  # fmt: skip
    assert ON.search(log), log
    assert len(re.findall("rank [01] serves", log)) == ranks
    (result,) = map(json.loads, (tmp_path / "result.jsonl").read_text().splitlines())
    assert result["batch_size"] == 2 and result["overall_throughput"] > 0


@pytest.mark.sweep
def test_one_batch_server_by_flags(launch: list[str], tmp_path: Path) -> None:
    """It starts a server in a process of its own."""
    pytest.importorskip("tabulate", reason="sglang.benchmark.one_batch_server imports it")
    port = str(free_port())
    log = run(
        "sglang.benchmark.one_batch_server", *launch, *ONE_BATCH,
        "--host", "127.0.0.1", "--port", port, "--skip-warmup", "--dataset-name", "random-ids",
        "--fairkv", "--fairkv-budget", "48",
        folder=tmp_path,
    )  # fmt: skip
    assert ON.search(log), log
    result = json.loads((tmp_path / "result.jsonl").read_text().splitlines()[-1])
    assert result["batch_size"] == 2 and result["overall_throughput"] > 0

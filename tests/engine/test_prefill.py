# SPDX-License-Identifier: Apache-2.0
"""Prompts are computed as stock SGLang computes them: its pool, its backend, its split of heads.

A plugin in every rank's process writes down what SGLang's pool is made of and each call of its
attention backend; an engine with FairKV and a stock one must have written the same. Both then serve
the batch of the identity tests.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fairkv_tests.engine_process import EngineProcess
from fairkv_tests.plugin_folder import PREFILL_PROBE, install_plugin
from fairkv_tests.tiny_models import hugging_face_outputs, random_prompts
from fairkv_tests.workloads import (
    BATCH,
    CHECKS,
    KV_HEADS,
    LAYERS,
    MODEL,
    NEW_TOKENS,
    far_from_home,
    random_plan,
    write_plan,
)

TP, SEED = 2, 41
POOL = 4096
PROMPTS = random_prompts([700, 33, 512, 1], vocab=500, seed=12)
FEW_TOKENS = 4


@dataclass(frozen=True)
class Seen:
    """What the plugin wrote while prompts were served one by one, their outputs, and the outputs of
    the batch of the identity tests after that.
    """

    lines: Counter[str]
    outputs: list[list[int]]
    batch: list[list[int]]


def _seen(model: Path, folder: Path, tokens: int, environment: dict[str, str]) -> Seen:
    probe = install_plugin(folder / "plugin", "prefill_probe", PREFILL_PROBE)
    engine = EngineProcess(
        model,
        folder / "log",
        environment={**CHECKS, **environment, "PYTHONPATH": str(probe)},
        tp_size=TP,
        max_total_tokens=tokens,
        chunked_prefill_size=256,
        load_format="safetensors",
        attention_backend="torch_native",
    )
    try:
        outputs = [engine.generate([prompt], FEW_TOKENS)[0] for prompt in PROMPTS]
        lines = re.findall(r"PROBE (.*)", engine.log)
        policies = engine.gloo_policies()
        assert len(policies) >= TP and set(policies) == {os.SCHED_BATCH}
        batch = engine.generate(BATCH, NEW_TOKENS)
        assert engine.generate(BATCH, NEW_TOKENS) == batch  # from the prefix cache
        if environment:
            state = engine.fairkv()
            assert state["placement"].startswith("random")
            assert {rank["pool_tokens"] for rank in state["ranks"]} == {POOL}
            handed = 2 * sum(map(len, BATCH)) + sum(map(len, PROMPTS))
            assert {rank["handed_over_tokens"] for rank in state["ranks"]} == {handed}
        else:
            assert "FairKV" not in engine.log
    finally:
        engine.close()
    return Seen(Counter(lines), outputs, batch)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    """Qwen3 has q/k norms."""
    return tiny_model(architecture="qwen3", **MODEL)


@pytest.fixture(scope="module")
def seen(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """Both engines: with FairKV's part of the memory on top, so that the pools are equal.

    FairKV is started as a user of stock SGLang would: plain ``sglang.Engine`` with a file named in
    the environment.
    """
    folder = tmp_path_factory.mktemp("prefill")
    assert far_from_home(random_plan(TP, SEED))
    plan = write_plan(folder, TP, SEED)
    file = folder / "fairkv.yaml"
    file.write_text(f"ratio: 1.0\nplan: {plan}\nreplan: 'off'\nprefill_pool: {POOL}\n")
    return {
        "fairkv": _seen(model, folder / "fairkv", 2 * POOL, {"FAIRKV_CONFIG": str(file)}),
        "stock": _seen(model, folder / "stock", POOL, {}),
    }


def _lines(seen: Counter[str], word: str) -> Counter[str]:
    return Counter({line: count for line, count in seen.items() if line.startswith(word)})


def test_pool_is_sglangs(seen: dict[str, Seen]) -> None:
    """Class, shapes, strides and types of K and V of every layer on both ranks."""
    for word, lines in (("pool ", TP * LAYERS * 2), ("allocator ", TP)):
        pools = {name: _lines(run.lines, word) for name, run in seen.items()}
        assert pools["fairkv"] == pools["stock"]
        assert pools["stock"].total() == lines
    assert any(f", {KV_HEADS // TP}, 32)" in line for line in _lines(seen["fairkv"].lines, "pool "))


def test_extend_is_sglangs(seen: dict[str, Seen]) -> None:
    """The same backend class, layers, query tokens and head counts in each call: nothing is
    computed twice, and nothing by another backend.
    """
    calls = {name: _lines(run.lines, "forward_extend ") for name, run in seen.items()}
    assert calls["fairkv"] == calls["stock"]
    passes = 3 + 1 + 2 + 1  # chunks of the prompts
    assert calls["stock"].total() == TP * LAYERS * passes
    assert all("CpuAttnBackend" in line for line in calls["stock"])


def test_decode_is_not(seen: dict[str, Seen]) -> None:
    """The probe sees stock decode, and none with FairKV."""
    stock = _lines(seen["stock"].lines, "forward_decode ")
    assert stock.total() >= TP * LAYERS * (FEW_TOKENS - 1)
    assert not _lines(seen["fairkv"].lines, "forward_decode ")


def test_outputs_are_the_models(model: Path, seen: dict[str, Seen]) -> None:
    """Of both, alone and in a batch, with heads that left their home and copies."""
    outputs = hugging_face_outputs(model, PROMPTS, FEW_TOKENS)
    batch = hugging_face_outputs(model, BATCH, NEW_TOKENS)
    for run in seen.values():
        assert run.outputs == outputs
        assert run.batch == batch

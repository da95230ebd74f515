# SPDX-License-Identifier: Apache-2.0
"""Prompts are computed as stock SGLang computes them: its pool, its backend, its split of heads.

A plugin in every rank's process writes down what SGLang's pool is made of and each call of its
attention backend; an engine with FairKV and a stock one must have written the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairkv_tests.engine_process import EngineProcess
from fairkv_tests.plugin_folder import PREFILL_PROBE, install_plugin
from fairkv_tests.tiny_models import hugging_face_outputs, random_prompts
from fairkv_tests.workloads import KV_HEADS, LAYERS, MODEL, far_from_home, random_plan, write_plan

TP, SEED = 2, 41
POOL = 4096
PROMPTS = random_prompts([700, 33, 512, 1], vocab=500, seed=12)
NEW_TOKENS = 4


def _seen(
    model: Path, folder: Path, fairkv: dict[str, Any] | None, tokens: int
) -> tuple[Counter[str], list[list[int]]]:
    """What the plugin wrote while prompts were served one by one, and the outputs."""
    probe = install_plugin(folder / "plugin", "prefill_probe", PREFILL_PROBE)
    engine = EngineProcess(
        model,
        folder / "log",
        fairkv=fairkv,
        environment={"PYTHONPATH": str(probe)},
        tp_size=TP,
        max_total_tokens=tokens,
        chunked_prefill_size=256,
        load_format="safetensors",
        attention_backend="torch_native",
    )
    try:
        outputs = [engine.generate([prompt], NEW_TOKENS)[0] for prompt in PROMPTS]
        lines = re.findall(r"PROBE (.*)", engine.log)
        if fairkv is not None:
            state = engine.fairkv()
            assert {rank["pool_tokens"] for rank in state["ranks"]} == {POOL}
    finally:
        engine.close()
    return Counter(lines), outputs


@pytest.fixture(scope="module")
def seen(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Counter[str], list[list[int]]]]:
    """Both engines: with FairKV's part of the memory on top, so that the pools are equal."""
    model, folder = tiny_model(**MODEL), tmp_path_factory.mktemp("prefill")
    assert far_from_home(random_plan(TP, SEED))
    plan = write_plan(folder, TP, SEED)
    fairkv = {"ratio": 1.0, "plan": plan, "replan": "off", "prefill_pool": POOL}
    return {
        "fairkv": _seen(model, folder / "fairkv", fairkv, 2 * POOL),
        "stock": _seen(model, folder / "stock", None, POOL),
    }


def _lines(seen: Counter[str], word: str) -> Counter[str]:
    return Counter({line: count for line, count in seen.items() if line.startswith(word)})


def test_pool_is_sglangs(seen: dict[str, tuple[Counter[str], list[list[int]]]]) -> None:
    """Class, shapes, strides and types of K and V of every layer on both ranks."""
    for word, lines in (("pool ", TP * LAYERS * 2), ("allocator ", TP)):
        pools = {name: _lines(log, word) for name, (log, _) in seen.items()}
        assert pools["fairkv"] == pools["stock"]
        assert pools["stock"].total() == lines
    assert any(f", {KV_HEADS // TP}, 32)" in line for line in _lines(seen["fairkv"][0], "pool "))


def test_extend_is_sglangs(seen: dict[str, tuple[Counter[str], list[list[int]]]]) -> None:
    """The same backend class, layers, query tokens and head counts in each call: nothing is
    computed twice, and nothing by another backend.
    """
    calls = {name: _lines(log, "forward_extend ") for name, (log, _) in seen.items()}
    assert calls["fairkv"] == calls["stock"]
    passes = 3 + 1 + 2 + 1  # chunks of the prompts
    assert calls["stock"].total() == TP * LAYERS * passes
    assert all("CpuAttnBackend" in line for line in calls["stock"])


def test_decode_is_not(
    tiny_model: Callable[..., Path], seen: dict[str, tuple[Counter[str], list[list[int]]]]
) -> None:
    """The probe sees stock decode, and none with FairKV; tokens are the model's."""
    assert _lines(seen["stock"][0], "forward_decode ").total() >= TP * LAYERS * (NEW_TOKENS - 1)
    assert not _lines(seen["fairkv"][0], "forward_decode ")
    assert seen["fairkv"][1] == seen["stock"][1]
    assert seen["stock"][1] == hugging_face_outputs(tiny_model(**MODEL), PROMPTS, NEW_TOKENS)

# SPDX-License-Identifier: Apache-2.0
"""Weights that come another way than from the checkpoint at start: twins follow.

One engine at TP 2 with an uneven, permuted, copied placement starts with random weights
(``--load-format dummy``) and is given two models in turn.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fairkv_tests.engine_process import EngineProcess
from fairkv_tests.tiny_models import hugging_face_outputs, random_prompts
from fairkv_tests.workloads import ENGINE, MODEL, far_from_home, random_plan, write_plan

SEED = 51
PROMPTS = random_prompts([1, 17, 40, 300, 513, 700], vocab=500, seed=13)
NEW_TOKENS = 16


@dataclass(frozen=True)
class Checkpoint:
    """A model and what it answers."""

    folder: Path
    outputs: list[list[int]]


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path]) -> list[Checkpoint]:
    """Two models of one shape; Qwen2 has biases."""
    folders = [tiny_model(architecture="qwen2", seed=seed, **MODEL) for seed in (0, 1)]
    found = [Checkpoint(f, hugging_face_outputs(f, PROMPTS, NEW_TOKENS)) for f in folders]
    assert all(a != b for a, b in zip(found[0].outputs, found[1].outputs, strict=True))
    return found


@pytest.fixture(scope="module")
def engine(
    models: list[Checkpoint],
    start_engine: Callable[..., EngineProcess],
    tmp_path_factory: pytest.TempPathFactory,
) -> EngineProcess:
    """Started without weights; its pool has pages of 16 tokens.

    Its first answers, nobody's, are looked at here: tests may come in any order.
    """
    assert far_from_home(random_plan(2, SEED))
    plan = write_plan(tmp_path_factory.mktemp("plan"), 2, SEED)
    made = start_engine(
        models[0].folder,
        fairkv={"ratio": 1.0, "plan": plan},
        tp_size=2,
        load_format="dummy",
        page_size=16,
        prefill_attention_backend="torch_native",
        **ENGINE,
    )
    outputs = made.generate(PROMPTS, NEW_TOKENS)
    assert [len(output) for output in outputs] == [NEW_TOKENS] * len(PROMPTS)
    assert all(outputs != model.outputs for model in models)
    return made


def _from_disk(engine: EngineProcess, folder: Path) -> tuple[bool, str]:
    """Whether SGLang has updated its weights, and what it says.

    SGLang flushes its cache behind an update and dies if it cannot, so the engine has to be idle.
    """
    engine.call("empty_cache")
    done, message, *_ = engine.call(
        "update_weights_from_disk", model_path=str(folder), load_format="auto"
    )
    return done, message


def test_dummy_weights_serve(engine: EngineProcess) -> None:
    """Twins are made of weights that came from nowhere; the fixture has looked at the answers."""
    assert "FairKV: decode twins of rank 1" in engine.log


def test_update_from_disk(engine: EngineProcess, models: list[Checkpoint]) -> None:
    """To one model, to the other, and back."""
    for model in (models[0], models[1], models[0]):
        done, message = _from_disk(engine, model.folder)
        assert done, message
        assert engine.generate(PROMPTS, NEW_TOKENS) == model.outputs
    engine.fairkv()


def test_update_that_fails_changes_nothing(
    engine: EngineProcess, models: list[Checkpoint], tmp_path: Path
) -> None:
    """A folder without weights: SGLang says so, the answers are the last model's."""
    assert _from_disk(engine, models[0].folder)[0]
    done, message = _from_disk(engine, tmp_path)
    assert not done and "Failed to get weights iterator" in message
    assert engine.generate(PROMPTS, NEW_TOKENS) == models[0].outputs


def test_update_from_tensors(engine: EngineProcess, models: list[Checkpoint]) -> None:
    """All tensors of a model, in two parts, as a trainer sends them."""
    assert _from_disk(engine, models[0].folder)[0]
    assert engine.generate(PROMPTS, NEW_TOKENS) == models[0].outputs
    engine.call("empty_cache")
    assert engine.call("update_from_tensors", folder=str(models[1].folder), parts=2) == "Success"
    assert engine.generate(PROMPTS, NEW_TOKENS) == models[1].outputs
    engine.fairkv()


@pytest.mark.sweep
def test_saved_shards_serve_another_placement(
    engine: EngineProcess,
    models: list[Checkpoint],
    start_engine: Callable[..., EngineProcess],
    tmp_path: Path,
) -> None:
    """Twins are in no list of weights: what a rank saves is SGLang's own split, for any plan."""
    assert _from_disk(engine, models[0].folder)[0]
    shards = tmp_path / "shards"
    shutil.copytree(models[0].folder, shards, ignore=shutil.ignore_patterns("*.safetensors"))
    engine.call("save_sharded_model", path=str(shards), pattern=None, max_size=None)
    other = start_engine(
        shards,
        fairkv={"ratio": 1.0, "plan": write_plan(tmp_path, 2, SEED + 1)},
        tp_size=2,
        load_format="sharded_state",
        **ENGINE,
    )
    assert other.generate(PROMPTS, NEW_TOKENS) == models[0].outputs

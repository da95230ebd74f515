# SPDX-License-Identifier: Apache-2.0
"""What every test gets: the environment of CPU runs, and tiny models."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
VARIABLES = ("FAIRKV_CONFIG", "FAIRKV_RESOLVED", "FAIRKV_PLAN", "SGLANG_PLUGINS", "SGLANG_PLATFORM")
for _variable in VARIABLES:
    os.environ.pop(_variable, None)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

import fairkv_sglang  # noqa: E402, F401  (takes the repository off the import path)

SERVED = {
    "gemma3_causal", "gpt_oss", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe",
}  # fmt: skip
"""SGLang's model files that tests serve. Each rank would import all 240 of them, for 5 s."""
if (_sglang := importlib.util.find_spec("sglang")) is not None and _sglang.origin:
    _models = {file.stem for file in Path(_sglang.origin).parent.glob("srt/models/*.py")}
    os.environ.setdefault("SGLANG_DISABLED_MODEL_ARCHS", ",".join(sorted(_models - SERVED)))

settings.register_profile("no-deadline", deadline=None)  # speed is measured in benchmarks
# `make test`: a change fails by what it changes; other targets and a bare pytest look for new ones.
settings.register_profile("same-examples", deadline=None, derandomize=True, database=None)
settings.load_profile("no-deadline")


@pytest.hookimpl(tryfirst=True)  # pytest's -m reads marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that both workers of ``-n 2`` are busy to the end."""
    engines = Path(__file__).parent / "engine"
    for item in items:
        if engines in item.path.parents:
            item.add_marker(pytest.mark.engine)
    for mark in ("slow", "engine"):
        items.sort(key=lambda item, mark=mark: item.get_closest_marker(mark) is None)


@pytest.fixture(autouse=True)
def _same_variables() -> Iterator[None]:
    """What a start in this process tells its children is not told to those of the next test."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model(architecture="llama", kv_heads=8, ...)`` gives a checkpoint; see TinyModel."""
    folder = tmp_path_factory.mktemp("models")

    def build(**shape: object) -> Path:
        from fairkv_tests.tiny_models import TinyModel
        from fairkv_tests.tiny_models import build as build_model

        return build_model(TinyModel(**shape), folder)  # type: ignore[arg-type]

    return build

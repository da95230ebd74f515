# SPDX-License-Identifier: Apache-2.0
"""What every test gets: the environment of CPU runs, and tiny models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
for _variable in (
    "FAIRKV_CONFIG",
    "FAIRKV_RESOLVED",
    "FAIRKV_PLAN",
    "SGLANG_PLUGINS",
    "SGLANG_PLATFORM",
):
    os.environ.pop(_variable, None)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

import fairkv_sglang  # noqa: E402, F401  (takes the repository off the import path)

settings.register_profile("no-deadline", deadline=None)  # speed is measured in benchmarks
settings.load_profile("no-deadline")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model(architecture="llama", kv_heads=8, ...)`` gives a checkpoint; see TinyModel."""
    folder = tmp_path_factory.mktemp("models")

    def build(**shape: object) -> Path:
        from fairkv_tests.tiny_models import TinyModel
        from fairkv_tests.tiny_models import build as build_model

        return build_model(TinyModel(**shape), folder)  # type: ignore[arg-type]

    return build

# SPDX-License-Identifier: Apache-2.0
"""Engines for the tests in this folder: started when asked for, shared by a module's tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fairkv_tests.engine_process import EngineProcess, ServerProcess
from fairkv_tests.plugin_folder import PROBE, install_plugin
from fairkv_tests.workloads import BATCH, ENGINE, MODEL, NEW_TOKENS, STRESS, STRESS_TOKENS


@pytest.fixture(scope="module")
def start_engine(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., EngineProcess]]:
    """``start_engine(model, fairkv={...}, tp_size=2, ...)``, one engine per set of arguments.

    Starting takes 10-20 s, so tests of a module share engines by asking for the same arguments.
    Engines stop when the module ends; ``.close()`` one early when it is in the way.
    """
    folder = tmp_path_factory.mktemp("engines")
    engines: dict[str, EngineProcess] = {}

    def start(model: Path, **arguments: object) -> EngineProcess:
        key = repr((str(model), sorted(arguments.items(), key=lambda item: item[0])))
        if key not in engines or engines[key].process.poll() is not None:
            log = folder / f"engine-{len(list(folder.iterdir()))}.log"
            engines[key] = EngineProcess(model, log, **arguments)  # type: ignore[arg-type]
        return engines[key]

    yield start
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module")
def start_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., ServerProcess]]:
    """``start_server(["--model-path", ..., "--fairkv"])``: an HTTP server of ``launch.py``."""
    folder = tmp_path_factory.mktemp("servers")
    servers: list[ServerProcess] = []
    numbers = count()  # several may start at once

    def start(arguments: list[str], **options: object) -> ServerProcess:
        log = folder / f"server-{next(numbers)}.log"
        servers.append(ServerProcess(arguments, log, **options))  # type: ignore[arg-type]
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@dataclass(frozen=True)
class Stock:
    """What stock SGLang did: the reference of the identity tests."""

    model: Path
    outputs: list[list[int]]
    stress_outputs: list[list[int]]
    state: dict[str, Any]
    log: str


@pytest.fixture(scope="session")
def stock(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Stock]:
    """``stock("llama")``: stock SGLang at TP 1, run once per model by whoever asks first."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers of this run

    def run(architecture: str, **shape: int) -> Stock:
        model = tiny_model(architecture=architecture, **(shape or MODEL))
        file = shared / f"stock-{model.name}.json"
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                file.write_text(json.dumps(_run_stock(model, shared)))
        return Stock(model, **json.loads(file.read_text()))

    return run


def _run_stock(model: Path, folder: Path) -> dict[str, Any]:
    """All of :class:`Stock` but the model."""
    probe = install_plugin(folder / f"probe-{model.name}", "rank_probe", PROBE)
    log = folder / f"stock-{model.name}.log"
    engine = EngineProcess(model, log, environment={"PYTHONPATH": str(probe)}, **ENGINE)
    try:
        return {
            "outputs": engine.generate(BATCH, NEW_TOKENS),
            "stress_outputs": engine.generate_each(STRESS, STRESS_TOKENS),
            "state": engine.internal_states()[0],
            "log": engine.log,
        }
    finally:
        engine.close()

# SPDX-License-Identifier: Apache-2.0
"""Runs a benchmark: every round runs all variants, in an order that rotates from round to round."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from fairkv_sglang.bench.checkpoint import build
from fairkv_sglang.bench.engine.process import EngineProcess, Engines
from fairkv_sglang.bench.engine.result import FORMAT, VERSION, summarise_case
from fairkv_sglang.bench.engine.settings import EngineSettings
from fairkv_sglang.bench.flags import proportions, shortened
from fairkv_sglang.bench.shares import find_profile
from fairkv_sglang.bench.stats import machine, rotated
from fairkv_sglang.model import Model

Progress = Callable[[str], None]


def run_bench(settings: EngineSettings, folder: Path | None, progress: Progress) -> dict[str, Any]:
    """All cases of a run.

    Args:
        settings: What to run.
        folder: For model, profile and logs; None takes a temporary one.
        progress: Called with a line after every run.

    An interrupt (Ctrl-C, SIGTERM) ends the run; if every variant has run at least once, the whole
    rounds so far are the result.

    Returns:
        The document of ``docs/performance.md``, plain JSON.

    Raises:
        EngineFailed: when an engine does not start or answer.
    """
    with _workplace(folder) as place, ended_by_signal():
        if settings.model_path is None:
            model = replace(settings.model, context=settings.context)
            path = build(model, place, getattr(torch, settings.dtype))
        else:
            path = settings.model_path.resolve()  # engines run in folders of their own
            model = replace(Model.from_config(path), name=shortened(path))
        profile = place / "profile.json"
        find_profile(settings.profile, model.num_layers, model.num_kv_heads).save(profile)
        cases = []
        for tp, budget in settings.cases():
            cases.append(_run_case(settings, tp, budget, path, profile, model, place, progress))
            if cases[-1]["interrupted"]:
                break
    return {
        "format": FORMAT,
        "version": VERSION,
        "machine": machine(settings.device),
        "model": proportions(model),
        "settings": settings.portable(),
        "cases": cases,
    }


def _run_case(
    settings: EngineSettings,
    tp: int,
    budget: dict[str, Any],
    path: Path,
    profile: Path,
    model: Model,
    place: Path,
    progress: Progress,
) -> dict[str, Any]:
    label = " ".join([f"TP {tp}", *(f"{key} {value}" for key, value in budget.items())])

    def start(name: str) -> EngineProcess:
        progress(f"{label}: starting {name}")
        options = settings.worker_options(name, tp, budget, path, profile)
        log = place / f"{name}-tp{tp}-{'-'.join(map(str, budget.values()))}.log"
        engine = EngineProcess(log, options, settings.measure)
        # Compile, fill caches, touch memory: nothing of a process's first run is counted.
        prompts = sorted(settings.make_prompts(model.vocab_size, 1 << 20), key=len)[-2:]
        engine.call("serve", prompts=prompts, new_tokens=[4] * len(prompts))
        return engine

    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in settings.variants}
    interrupted = False
    engines = Engines(start, settings.keep_alive, lambda: psutil.virtual_memory().available)
    try:
        for index in range(settings.rounds):
            prompts = settings.make_prompts(model.vocab_size, index)
            lengths = [settings.output_len] * len(prompts)
            for name in rotated(settings.variants, index):
                engine = engines.get(name)
                load = os.getloadavg()[0]
                result = engine.call("serve", prompts=prompts, new_tokens=lengths)
                rounds[name].append({"load": load, "at": time.time(), **result})
                rate = result["output_tokens"] / result["seconds"]
                progress(f"{label}: round {index + 1} {name} {rate:.1f} tok/s, load {load:.1f}")
    except KeyboardInterrupt:
        whole = min(map(len, rounds.values()))
        if whole == 0:
            raise
        progress(f"{label}: interrupted, {whole} whole rounds count")
        rounds = {name: runs[:whole] for name, runs in rounds.items()}
        interrupted = True
    finally:
        engines.close()
    return {
        "tp": tp,
        **budget,
        "interrupted": interrupted,
        "max_total_tokens": settings.total_tokens(budget),
        "engine_starts": engines.starts,
        **summarise_case(rounds, settings),
    }


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """SIGTERM acts like Ctrl-C: frozen engines must not be left behind."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _workplace(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="fairkv-bench-") as name:
        yield Path(name)

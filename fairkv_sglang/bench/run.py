# SPDX-License-Identifier: Apache-2.0
"""Runs a benchmark: every round runs all variants, in an order that rotates from round to round."""

from __future__ import annotations

import json
import os
import platform
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from fairkv_sglang.bench.engines import BenchEngine, Engines
from fairkv_sglang.bench.gpu.report import versions
from fairkv_sglang.bench.model import build
from fairkv_sglang.bench.result import FORMAT, VERSION, summarise_case
from fairkv_sglang.bench.settings import Settings
from fairkv_sglang.bench.shares import find_profile
from fairkv_sglang.bench.stats import rotated
from fairkv_sglang.bench.workload import Workload, portable
from fairkv_sglang.placement.model import ModelShape

Progress = Callable[[str], None]


def run_bench(settings: Settings, folder: Path | None, progress: Progress) -> dict[str, Any]:
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
    with _workplace(folder) as place:
        if settings.model_path is None:
            model = build(settings.model.model_copy(update={"context": settings.context}), place)
        else:
            model = settings.model_path
        shape, vocab = ModelShape.from_config(model), _vocabulary(model)
        profile = None
        if settings.scope == "head" or settings.profile is not None:
            profile = place / "profile.json"
            find_profile(settings.profile, shape.num_layers, shape.num_kv_heads).save(profile)
        cases = []
        with _ended_by_signal():
            for tp, budget in settings.cases():
                case = _run_case(settings, tp, budget, model, profile, vocab, place, progress)
                cases.append(case)
                if case["interrupted"]:
                    break
    return {
        "format": FORMAT,
        "version": VERSION,
        "machine": machine(settings.device),
        "settings": portable(settings.model_dump(mode="json")),
        "cases": cases,
    }


def _run_case(
    settings: Settings,
    tp: int,
    budget: dict[str, Any],
    model: Path,
    profile: Path | None,
    vocab: int,
    place: Path,
    progress: Progress,
) -> dict[str, Any]:
    label = " ".join([f"TP {tp}", *(f"{key} {value}" for key, value in budget.items())])

    def start(name: str) -> BenchEngine:
        progress(f"{label}: starting {name}")
        options = settings.worker_options(name, tp, budget, model, profile)
        log = place / f"{name}-tp{tp}-{'-'.join(map(str, budget.values()))}.log"
        engine = BenchEngine(name, options, settings.environment(), log)
        # Compile, fill caches, touch memory: nothing of a process's first run is counted.
        longest = max(settings.workload.prompt_lengths)
        engine.run(Workload(prompts=2, prompt_lengths=(longest,), output_length=4), vocab, 1 << 20)
        return engine

    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in settings.variants}
    interrupted = False
    engines = Engines(start, settings.keep_alive, lambda: psutil.virtual_memory().available)
    try:
        for index in range(settings.rounds):
            for name in rotated(settings.variants, index):
                engine = engines.get(name)
                load = os.getloadavg()[0]
                result = engine.run(settings.workload, vocab, index)
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
        **summarise_case(rounds, settings.workload),
    }


def _vocabulary(model: Path) -> int:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return int(config.get("text_config", config)["vocab_size"])


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    result = {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "device": device,
        "load": list(os.getloadavg()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    result |= versions("sglang", "torch", "numba", "fairkv-sglang")
    if device == "cuda":
        import torch

        result["gpu"] = torch.cuda.get_device_name(0)
    return result


@contextmanager
def _ended_by_signal() -> Iterator[None]:
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

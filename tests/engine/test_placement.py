# SPDX-License-Identifier: Apache-2.0
"""At a quarter of the cache the answer depends on the budgets alone, not on where heads are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_process import EngineProcess
from sweep_report import SweepReport
from workloads import BATCH, ENGINE, KV_HEADS, LAYERS, LENGTHS, MODEL, write_plan, write_profile

QUARTER = 0.25
NEW_TOKENS = 48
WINDOW = 32
TP, SEEDS = (2, 4), (11, 12, 13)


@dataclass(frozen=True)
class Run:
    """One engine's answers, and its state afterwards."""

    outputs: list[list[int]]
    state: dict[str, Any]


def _options(folder: Path, scope: str, tp_size: int, placement: str | int) -> dict[str, Any]:
    """FairKV's options; scope ``head`` takes budgets from a profile, as does every placement."""
    options: dict[str, Any] = {
        "ratio": QUARTER,
        "scope": scope,
        "window": WINDOW,
        "profile": write_profile(folder),
    }
    if isinstance(placement, int):
        return {**options, "plan": write_plan(folder, tp_size, placement)}
    return {**options, "placement": placement}


def _run(model: Path, folder: Path, scope: str, tp_size: int, placement: str | int) -> Run:
    engine = EngineProcess(
        model,
        folder / "log",
        fairkv=_options(folder, scope, tp_size, placement),
        tp_size=tp_size,
        **ENGINE,
    )
    try:
        outputs = engine.generate(BATCH, NEW_TOKENS)
        # Chunks, batches and cached prefixes differ now, kept sets must not.
        assert engine.generate(BATCH[::-1], NEW_TOKENS)[::-1] == outputs
        return Run(outputs, engine.fairkv())
    finally:
        engine.close()


@pytest.fixture(scope="session")
def one_rank(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """``one_rank("layer")``: the same budgets at TP 1, run once."""
    done: dict[str, Run] = {}

    def run(scope: str) -> Run:
        if scope not in done:
            folder = tmp_path_factory.mktemp(f"one-rank-{scope}")
            done[scope] = _run(tiny_model(**MODEL), folder, scope, 1, "contiguous")
        return done[scope]

    return run


def _same(run: Run, reference: Run) -> bool:
    """Equal tokens, and equal kept counts of every head over all prompts."""
    return (
        run.outputs == reference.outputs
        and run.state["kept"]["tokens"] == reference.state["kept"]["tokens"]
    )


def _check_compressed(run: Run) -> None:
    """About a quarter is kept: more only of prompts that are not much longer than the window."""
    state = run.state
    assert state["prompt_tokens"] == 2 * sum(LENGTHS)
    full = state["prompt_tokens"] * LAYERS * KV_HEADS
    allowed = 2 * sum(min(n, n * QUARTER + WINDOW + 1) for n in LENGTHS) * LAYERS * KV_HEADS
    assert QUARTER * full * 0.99 <= state["kept_tokens"] <= allowed < 0.4 * full


@pytest.mark.parametrize(
    ("scope", "tp_size", "seed"), [("layer", 2, 11), ("head", 4, 12)], ids=["layer-2", "head-4"]
)
def test_answer_is_that_of_one_rank(
    tiny_model: Callable[..., Path],
    one_rank: Callable[[str], Run],
    tmp_path: Path,
    scope: str,
    tp_size: int,
    seed: int,
) -> None:
    """Random placements with copies, against TP 1."""
    run = _run(tiny_model(**MODEL), tmp_path, scope, tp_size, seed)
    assert _same(run, one_rank(scope))
    _check_compressed(run)


@pytest.fixture(scope="module")
def report() -> SweepReport:
    """Table of the sweep."""
    return SweepReport(
        "placement-sweep",
        "Placement never changes an answer",
        f"A quarter of the cache, greedy, float32, CPU, tiny random Llama, {len(BATCH)} prompts of "
        f"{min(LENGTHS)} to {max(LENGTHS)} tokens, {NEW_TOKENS} new tokens each: tokens, and kept "
        "counts of every head, compared with TP 1. Made by `make sweep`.",
        ("scope", "TP", "placement"),
    )


@pytest.mark.sweep
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scope", ["layer", "head", "uniform"])
@pytest.mark.parametrize("tp_size", TP)
@pytest.mark.parametrize(
    "placement",
    ["contiguous", "best_effort", "fair_copying", "equal_shares", "equal_count", "exact", *SEEDS],
)
def test_sweep(
    tiny_model: Callable[..., Path],
    one_rank: Callable[[str], Run],
    tmp_path: Path,
    report: SweepReport,
    scope: str,
    tp_size: int,
    placement: str | int,
) -> None:
    """Every policy and random placements, scopes ``layer``, ``head`` and ``uniform``."""
    run = _run(tiny_model(**MODEL), tmp_path, scope, tp_size, placement)
    equal = _same(run, one_rank(scope))
    name = "random" if isinstance(placement, int) else placement
    report.add((scope, str(tp_size), name), f"{scope} TP {tp_size} {placement}", equal)
    assert equal
    _check_compressed(run)

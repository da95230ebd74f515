# SPDX-License-Identifier: Apache-2.0
"""The order of a run, and what is left of it when it is interrupted; engines are stand-ins."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fairkv_sglang.bench.engine import run as module
from fairkv_sglang.bench.engine.run import run_bench
from fairkv_sglang.bench.engine.settings import EngineSettings
from fairkv_tests.bench_runs import a_run

VARIANTS = ("stock", "contiguous", "fair_copying")


class Stage:
    """Stand-ins for engines, with a list of what they were asked to do."""

    def __init__(self, end_after: int | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.closed: list[str] = []
        self.models: set[str] = set()
        self.end_after = end_after

    def engine(self, log: Path, options: dict[str, Any], measure: bool) -> Any:
        stage, name = self, log.stem.partition("-tp")[0]
        self.models.add(options["engine"]["model_path"])

        class Engine:
            def call(self, method: str, prompts: Any, new_tokens: list[int]) -> dict[str, Any]:
                if new_tokens[0] != 4:  # not the warm-up
                    stage.calls.append((name, prompts[0][0]))
                    if len(stage.calls) == stage.end_after:
                        os.kill(os.getpid(), signal.SIGTERM)
                return a_run(1.0 + len(name), 30.0, 20.0)

            def freeze(self) -> None: ...

            def thaw(self) -> None: ...

            def close(self) -> None:
                stage.closed.append(name)

        return Engine()


def settings(**changes: Any) -> EngineSettings:
    values: dict[str, Any] = {
        "variants": VARIANTS,
        "rounds": 3,
        "keep_alive": 3,
        "model": "attention-only,layers=2,hidden=16,mlp=16,vocab=64",
        "prompts": 4,
        "prompt_len": (100,),
        "output_len": 11,
        **changes,
    }
    return EngineSettings(**values)


def test_every_round_runs_all_variants_in_another_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage = Stage()
    monkeypatch.setattr(module, "EngineProcess", stage.engine)
    lines: list[str] = []
    result = run_bench(settings(budgets=(32, 64)), tmp_path, lines.append)
    first = stage.calls[:9]
    token = [settings().make_prompts(64, index)[0][0] for index in range(3)]
    assert [index for _, index in first] == [token[i // 3] for i in range(9)]
    assert [first[i][0] for i in (0, 3, 6)] == list(VARIANTS)
    assert sorted(stage.closed) == sorted(VARIANTS * 2)
    assert [case["budget"] for case in result["cases"]] == [32, 64]
    assert (result["format"], result["version"]) == ("fairkv-bench", 2)
    assert sum("starting" not in line for line in lines) == 18
    assert EngineSettings(**result["settings"]) == settings(budgets=(32, 64))
    assert result["model"].startswith("attention-only,layers=2,hidden=16,mlp=16,vocab=64: 2 layers")
    json.dumps(result, allow_nan=False)


def test_an_interrupted_run_keeps_its_whole_rounds_and_leaves_no_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage = Stage(end_after=8)
    monkeypatch.setattr(module, "EngineProcess", stage.engine)
    result = run_bench(settings(budgets=(32, 64)), tmp_path, lambda line: None)
    (case,) = result["cases"]
    assert case["interrupted"]
    assert [len(entry["rounds"]) for entry in case["variants"].values()] == [2, 2, 2]
    assert sorted(stage.closed) == sorted(VARIANTS)


def test_an_interrupt_before_the_first_whole_round_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage = Stage(end_after=2)
    monkeypatch.setattr(module, "EngineProcess", stage.engine)
    with pytest.raises(KeyboardInterrupt):
        run_bench(settings(), tmp_path, lambda line: None)
    assert sorted(stage.closed) == ["contiguous", "stock"]


def test_a_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read model config"):
        run_bench(settings(model_path=tmp_path / "no"), tmp_path, lambda line: None)


def test_a_checkpoint_may_be_named_from_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage = Stage()
    monkeypatch.setattr(module, "EngineProcess", stage.engine)
    run_bench(settings(rounds=1), tmp_path / "first", lambda line: None)
    [built] = stage.models
    monkeypatch.chdir(Path(built).parent)
    stage.models.clear()
    one = settings(rounds=1, model_path=Path(Path(built).name))
    result = run_bench(one, tmp_path / "second", lambda line: None)
    assert stage.models == {built}
    assert result["model"].startswith("/".join(Path(built).parts[-3:]) + ": ")

# SPDX-License-Identifier: Apache-2.0
"""The real thing, small: two engines in turn at TP 2, measured by the hooks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fairkv_sglang.bench.engine.process import EngineProcess
from fairkv_sglang.cli.main import main
from fairkv_tests.engine_process import HELPERS

pytestmark = pytest.mark.engine


def test_stock_and_fair_copying_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineProcess.__init__, "__defaults__", ("fairkv_tests.bench_worker",))
    monkeypatch.setenv("PYTHONPATH", str(HELPERS), prepend=os.pathsep)
    words = ["bench", "--variants", "stock,contiguous,fair_copying", "--rounds", "2", "--tp", "2"]
    words += ["--prompts", "4", "--prompt-len", "160", "--output-len", "8", "--budgets", "48"]
    words += ["--model", "qwen3-0.6b,layers=2,hidden=64,mlp=128,head_dim=16", "--keep-alive", "3"]
    words += ["--out", str(tmp_path), "--work-dir", str(tmp_path / "work")]
    assert main(words) == 0, capsys.readouterr().err
    data = json.loads((tmp_path / "bench.json").read_text())
    (case,) = data["cases"]
    assert case["engine_starts"] == 3  # kept alive, frozen between their turns
    for entry in case["variants"].values():
        metrics = entry["metrics"]
        assert metrics["output_tokens_per_s"]["count"] == 2
        assert metrics["peak_requests"]["median"] == 4
        assert metrics["ttft_s"]["least"] > 0 and metrics["itl_ms"]["least"] > 0
        assert len(entry["ranks"]["waiting_ms"]) == 2
        measured = entry["rounds"][0]["measured"]
        # embedding, and two all-reduces in each of two layers
        assert measured["collectives"] == 5
        assert 0 < measured["communication_ms"] < measured["period_ms"]
    stock, fair = case["variants"]["stock"], case["variants"]["fair_copying"]
    assert stock["plan"] == {} and fair["plan"]["decisions_agree"]
    assert fair["metrics"]["balancedness"]["median"] > 0.5
    assert fair["memory"]["page_overhead"] >= 1
    assert set(case["balancing"]) == {"fair_copying"}
    assert (tmp_path / "bench.png").stat().st_size > 10_000

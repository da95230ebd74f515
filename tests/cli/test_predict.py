# SPDX-License-Identifier: Apache-2.0
"""``fairkv predict``: its traces, its figures, what it refuses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from fairkv_sglang.cli.main import main
from fairkv_sglang.cli.predict import add_arguments, all_traces, tasks

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Five requests of one task and three of another, whose hot heads differ."""
    rng = np.random.default_rng(0)
    kept = 4128 + 100 * rng.lognormal(0, 0.1, (8, 4, 4))
    kept[:5, :, 0] += 900
    kept[5:, :, 3] += 900
    samples = [[1000 + i, 32, 1032 + i, 4096] for i in range(8)]
    meta = {"dataset_mix": "one:5,two:3"}
    path = tmp_path / "mixed_tasks.json"
    path.write_text(json.dumps({"kept": kept.tolist(), "samples": samples, "meta": meta}))
    return path


SMALL = ["--window", "8", "--windows", "4", "--layers", "2", "--batch", "4", "--tp", "2"]


def test_traces(requests: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [str(requests), "--window", "16", "--windows", "10", "--layers", "3"]
    first, second = (list(all_traces(parser.parse_args(words))) for _ in range(2))
    assert [trace.name for trace in first] == [
        "mixed_tasks, steady", "mixed_tasks, shift",
        "made up, steady", "made up, shift", "made up, drift",
    ]  # fmt: skip
    for one, other in zip(first, second, strict=True):
        assert (one.kept == other.kept).all()
        assert one.kept.shape[:2] == (160, 3) and (one.kept > 0).all()
    assert tasks(requests, 8) == 5
    assert tasks(requests, 9) == 4
    for trace in (first[1], first[3]):
        halves = [trace.kept[part].sum(axis=0) for part in (slice(80), slice(80, None))]
        assert any(a.argmax() != b.argmax() for a, b in zip(*halves, strict=True)), trace.name
    assert (first[1].kept[:80, 0].argmax(axis=1) == 0).all()
    assert (first[1].kept[80:, 0].argmax(axis=1) == 3).all()


def test_json_and_tables(requests: Path, capsys: Capture) -> None:
    words = ["predict", str(requests), *SMALL, "--predictors", "mean,exponential"]
    assert main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["results"]) == 5
    for result in data["results"]:
        assert set(result["error"]) == {"mean", "exponential"}
        assert all(0 <= value <= 1 for value in result["error"].values())
        assert all(value >= 1 for value in result["imbalance"].values())
        assert result["imbalance"]["known"] <= result["imbalance"]["contiguous"] + 0.02
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "mixed_tasks, shift" in text and "next window" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predictors", "median"], "unknown predictor 'median'; choose from mean"),
        (["--window", "7"], "--window must be at least 8"),
        (["--tp", "0"], "--tp must be at least 1"),
        (["missing.json"], "cannot read requests missing.json"),
    ],
)
def test_refusals(words: list[str], message: str, capsys: Capture) -> None:
    assert main(["predict", *SMALL, *words]) == 2
    assert message in capsys.readouterr().err

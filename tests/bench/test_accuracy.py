# SPDX-License-Identifier: Apache-2.0
"""The table of the accuracy command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairkv_sglang.bench import accuracy_table, accuracy_threshold
from fairkv_sglang.bench.accuracy_table import FULL, Table, order, update_page
from fairkv_sglang.bench.accuracy_threshold import NEAR, calibrated, find_threshold, options_above


def _cells(accuracy: float, **more: Any) -> list[dict[str, Any]]:
    cell = {"accuracy": accuracy, "interval": [accuracy - 0.1, accuracy + 0.1], **more}
    return [{**cell, "mode": mode} for mode in ("aware", "agnostic")]


RUNS = {
    "snapkv-layer-0.125": _cells(0.5, pairs=10, lost=5, won=1),
    FULL: _cells(0.9),
    "keydiff-uniform-0.5": _cells(0.8, pairs=10, lost=1, won=0),
}


def test_a_cell_for_each_mode_and_share(tmp_path: Path) -> None:
    """A run that is not there leaves its cell empty."""
    table = Table(RUNS)
    lines = table.markdown().splitlines()
    assert lines[0].count("aware, 50 %") == 1
    assert lines[2] == "| full cache" + " | 90 [80..100]" * 4 + " |"
    assert lines[3] == "| keydiff, uniform | 80 [70..90] 1/0 |  | 80 [70..90] 1/0 |  |"
    assert lines[4] == "| snapkv, layer |  | 50 [40..60] 5/1 |  | 50 [40..60] 5/1 |"
    table.draw(tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 1000


def test_runs_are_ordered() -> None:
    runs = ["snapkv-layer-0.125", "keydiff-layer-0.25", FULL, "keydiff-layer-0.5"]
    ordered = [FULL, "keydiff-layer-0.5", "keydiff-layer-0.25", "snapkv-layer-0.125"]
    assert sorted(runs, key=order) == ordered


def test_only_the_model_s_table_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table of one -->\nold\n<!-- end -->\nb\n")
    monkeypatch.setattr(accuracy_table, "PAGE", page)
    update_page("one", "new")
    assert page.read_text() == "a\n<!-- table of one -->\nnew\n<!-- end -->\nb\n"
    with pytest.raises(SystemExit, match="table of two"):
        update_page("two", "new")


def test_a_threshold_s_share_stands_in_its_cell() -> None:
    """Its memory follows from the prompts; that of the others is the column's."""
    runs = RUNS | {"snapkv-threshold-0.5": _cells(0.5, pairs=10, lost=4, won=0, kept=0.486)}
    line = Table(runs).markdown().splitlines()[-1]
    assert line.startswith("| snapkv, threshold | 50 [40..60] 4/0 (49 %) |  |")


@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(-5, 8),
    shift=st.floats(-3, 3),
    wanted=st.sampled_from([0.5, 0.25, 0.125]),
)
def test_the_threshold_keeps_what_is_wanted(
    seed: int, scale: float, shift: float, wanted: float
) -> None:
    """Scores of any size and sign."""
    scores = (np.random.default_rng(seed).standard_normal(4000) + shift) * 10.0**scale
    threshold = find_threshold(lambda value: float((scores > value).mean()), wanted)
    assert abs((scores > threshold).mean() / wanted - 1) <= NEAR


def test_scores_that_tie_give_the_nearest_share() -> None:
    """Three quarters score the same: 25 % or all can be kept."""
    scores = np.array([0.0] * 75 + [1.0] * 25)
    threshold = find_threshold(lambda value: float((scores > value).mean()), 0.5)
    assert (scores > threshold).mean() == 0.25


def test_a_threshold_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the server, by what its heads keep; then it is in the file."""
    scores = np.linspace(-1, 1, 1000)
    state = {"tokens": [[0, 0], [0, 0]], "prompt_tokens": 0}
    asked: list[dict[str, Any]] = []

    def post(url: str, body: dict[str, Any] | None, timeout: float = 0) -> Any:
        if body is None:
            return {"internal_states": [{"fairkv": {"kept": state}}]}
        asked.append(body)
        options = body["sampling_params"]["custom_params"]["fairkv"]
        assert options == options_above("keydiff", options["threshold"])
        above = int((scores > options["threshold"]).sum())
        state["prompt_tokens"] += len(scores)
        state["tokens"] = [[kept + above for kept in layer] for layer in state["tokens"]]
        return {}

    monkeypatch.setattr(accuracy_threshold, "post", post)
    file = tmp_path / "thresholds.json"
    found = calibrated("http://x", "keydiff", 0.25, [[1, 2]], file)
    assert found == pytest.approx(0.5, abs=0.006)
    count = len(asked)
    assert 0 < count < 40
    assert calibrated("http://x", "keydiff", 0.25, [[1, 2]], file) == found
    assert len(asked) == count

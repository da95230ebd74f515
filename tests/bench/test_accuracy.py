# SPDX-License-Identifier: Apache-2.0
"""The table of the accuracy command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fairkv_sglang.bench import accuracy_table
from fairkv_sglang.bench.accuracy_table import FULL, Table, order, update_page


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

# SPDX-License-Identifier: Apache-2.0
"""Table and heat map of the runs of ``bench/accuracy.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairkv_sglang.evaluation.summary import Cell

PAGE = Path(__file__).resolve().parents[1] / "docs" / "accuracy.md"
FULL = "full"
"""Name of the run with the full cache; the others are ``SCORER-SCOPE-SHARE``."""
MODES = ("aware", "agnostic")


def order(run: str) -> tuple[bool, str, float]:
    """The full cache first, then methods by name, larger shares first."""
    method, _, share = run.rpartition("-")
    return run != FULL, method, -float(share) if method else 0.0


class Table:
    """A row for each scorer and scope, a column for each mode and kept share.

    Args:
        runs: Name of a run -> its cells; the last of each mode is that of all tasks together.
    """

    def __init__(self, runs: dict[str, list[Cell]]) -> None:
        self._cells: dict[tuple[str, str, str], Cell] = {}
        for name, cells in runs.items():
            method, _, share = name.rpartition("-")
            for cell in cells:
                self._cells[method, cell["mode"], share] = cell
        self.full = {mode: self._cells["", mode, FULL] for mode in MODES}
        methods = {method for method, _, _ in self._cells if method}
        self.methods = sorted(methods)
        shares = {share for method, _, share in self._cells if method}
        self.columns = [(m, s) for m in MODES for s in sorted(shares, key=float, reverse=True)]

    def markdown(self) -> str:
        """Accuracy in per cent with its interval, samples lost and won against the full cache."""
        head = [f"{mode}, {100 * float(share):g} %" for mode, share in self.columns]
        lines = [f"| scorer, scope | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
        full = [_figures(self.full[mode]) for mode, _ in self.columns]
        lines.append(f"| full cache | {' | '.join(full)} |")
        for method in self.methods:
            cells = [self._cells.get((method, *column)) for column in self.columns]
            row = ["" if cell is None else _figures(cell) for cell in cells]
            if method.endswith("-threshold"):  # all others keep what the column says
                row = [
                    f"{figures} ({100 * cell['kept']:.0f} %)"
                    if cell and "kept" in cell
                    else figures
                    for figures, cell in zip(row, cells, strict=True)
                ]
            lines.append(f"| {method.replace('-', ', ')} | {' | '.join(row)} |")
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """The same as a heat map."""
        import numpy as np
        from matplotlib.figure import Figure

        rows = ["full cache", *(method.replace("-", ", ") for method in self.methods)]
        values = np.full((len(rows), len(self.columns)), np.nan)
        for y, method in enumerate(["", *self.methods]):
            for x, (mode, share) in enumerate(self.columns):
                cell = self.full[mode] if not method else self._cells.get((method, mode, share))
                if cell is not None:
                    values[y, x] = 100 * cell["accuracy"]
        figure = Figure(figsize=(7, 1.2 + 0.24 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                color = "black" if 15 < value < 90 else "white"  # the map is dark at its ends
                axes.text(x, y, f"{value:.0f}", color=color, ha="center", va="center", fontsize=7)
        names = [f"{mode}\n{100 * float(share):g} %" for mode, share in self.columns]
        axes.set_xticks(range(len(names)), names, fontsize=7)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        axes.xaxis.tick_top()
        axes.set_title("right answers in per cent, by what is kept", fontsize=9)
        figure.savefig(path, dpi=110)


def _figures(cell: dict[str, Any]) -> str:
    low, high = (100 * edge for edge in cell["interval"])
    right = f"{100 * cell['accuracy']:.0f} [{low:.0f}..{high:.0f}]"
    return f"{right} {cell['lost']}/{cell['won']}" if "pairs" in cell else right


def update_page(model: str, table: str) -> None:
    """Replace the table of a model in the page."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = f"<!-- table of {model} -->\n", "\n<!-- end -->"
    before, found, after = text.partition(start)
    if not found:
        raise SystemExit(f"{PAGE} has no line {start.strip()!r}")
    PAGE.write_text(before + start + table + end + after.partition(end)[2], encoding="utf-8")

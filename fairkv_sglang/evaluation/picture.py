# SPDX-License-Identifier: Apache-2.0
"""Accuracy of runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fairkv_sglang.evaluation.summary import Cell


def draw(runs: Mapping[str, Sequence[Cell]], path: Path) -> None:
    """A panel for each mode: tasks and lengths from left to right, a mark for each run.

    Args:
        runs: Name -> cells of :func:`~fairkv_sglang.evaluation.summary.summarise`.
        path: Picture; the ending decides the format.
    """
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(cell["mode"] for cells in runs.values() for cell in cells))
    figure = Figure(figsize=(10, 3.2 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), 1, squeeze=False)[:, 0]
    for panel, mode in zip(panels, modes, strict=True):
        of_mode = {n: [c for c in cells if c["mode"] == mode] for n, cells in runs.items()}
        kinds = list(dict.fromkeys((c["task"], c["tokens"]) for x in of_mode.values() for c in x))
        for number, (name, cells) in enumerate(of_mode.items()):
            shift = 0.6 * ((number + 0.5) / len(runs) - 0.5)
            x = [kinds.index((c["task"], c["tokens"])) + shift for c in cells]
            y = [c["accuracy"] for c in cells]
            low = [max(c["accuracy"] - c["interval"][0], 0.0) for c in cells]
            high = [max(c["interval"][1] - c["accuracy"], 0.0) for c in cells]
            panel.errorbar(x, y, yerr=(low, high), fmt="o", capsize=2, markersize=4, label=name)
        names = [f"{task}\n{tokens}" if tokens else task for task, tokens in kinds]
        panel.set_xticks(range(len(kinds)), names, fontsize=7)
        panel.set_ylim(-0.03, 1.03)
        panel.set_ylabel("right")
        panel.set_title(f"query-{mode}", loc="left", fontsize=9)
        panel.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize=7, ncols=min(len(runs), 4))
    figure.savefig(path, dpi=110)

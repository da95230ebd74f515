# SPDX-License-Identifier: Apache-2.0
"""A table of what a sweep has tried, for ``docs/results``.

Set ``FAIRKV_SWEEP_REPORT`` to a folder; each sweep writes a Markdown file of its own there.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

VARIABLE = "FAIRKV_SWEEP_REPORT"


class SweepReport:
    """Counts of cases, by group; rewritten after every case, so that a broken-off sweep leaves one.

    Args:
        name: File name without suffix.
        title: Heading of the page.
        text: What a case is and what it is compared with.
        groups: Names of the columns that a case is counted under.
    """

    def __init__(self, name: str, title: str, text: str, groups: tuple[str, ...]) -> None:
        folder = os.environ.get(VARIABLE)
        self.path = Path(folder) / f"{name}.md" if folder else None
        self.head = f"# {title}\n\n{text}\n"
        self.groups = groups
        self.total: Counter[tuple[str, ...]] = Counter()
        self.equal: Counter[tuple[str, ...]] = Counter()
        self.failed: list[str] = []

    def add(self, group: tuple[str, ...], case: str, equal: bool) -> None:
        """Count one case."""
        self.total[group] += 1
        self.equal[group] += equal
        if not equal:
            self.failed.append(case)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self.text())

    def text(self) -> str:
        """The page."""
        lines = [
            self.head,
            "| " + " | ".join((*self.groups, "cases", "identical")) + " |",
            "|" + "---|" * (len(self.groups) + 2),
        ]
        for group in sorted(self.total):
            cells = (*group, str(self.total[group]), str(self.equal[group]))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append(
            f"\nAll: {self.total.total()} cases, {self.equal.total()} identical."
            + "".join(f"\n- different: {case}" for case in self.failed)
        )
        return "\n".join(lines) + "\n"

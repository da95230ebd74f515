# SPDX-License-Identifier: Apache-2.0
"""What ran, what passed, what did not run and why."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

WIDTH = 54


class NotRun(Exception):
    """A part that cannot run here; its text says why."""


def need(ok: bool, message: str) -> None:
    """Raise RuntimeError with the message unless ok; `assert` is off under `python -O`."""
    if not ok:
        raise RuntimeError(message)


def require(module: str, name: str) -> None:
    """Raise NotRun unless the module is installed."""
    if importlib.util.find_spec(module) is None:
        raise NotRun(f"{name} is not installed")


class Report:
    """One row for each check, printed when the check is done.

    Args:
        budget: Seconds after which no further check starts.
    """

    def __init__(self, budget: float) -> None:
        self.budget, self.begin = budget, time.perf_counter()
        self.rows: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        """Seconds until the budget is used up."""
        return self.budget - (time.perf_counter() - self.begin)

    def check(self, name: str, work: Callable[[], object], seconds: float = 0) -> None:
        """Run a check and add its row.

        Args:
            name: Of the row.
            work: Raises if the check fails; what it returns, if anything, is shown.
            seconds: What it may take: it is left out if less is left.
        """
        start, status, detail = time.perf_counter(), "passed", ""
        try:
            if self.left < seconds:
                raise NotRun("out of time")
            detail = str(work() or "")
        except NotRun as reason:
            status, detail = "not run", str(reason)
        except Exception as error:  # every failure is a row of the report
            status, detail = "FAILED", f"{type(error).__name__}: {error}"
        took = time.perf_counter() - start
        row = {"name": name, "status": status, "seconds": round(took, 2), "detail": detail}
        self.rows.append(row)
        first, *others = detail.splitlines() or [""]
        result = f"{status}: {first}" if first else status
        print("\n    ".join([f"{name:{WIDTH}}{took:7.1f} s  {result}", *others]), flush=True)

    def count(self, status: str) -> int:
        """Rows with this status."""
        return sum(row["status"] == status for row in self.rows)

    def summary(self) -> str:
        """How many passed, failed and did not run."""
        counts = ", ".join(f"{self.count(s)} {s.lower()}" for s in ("passed", "FAILED", "not run"))
        return f"{counts}, in {time.perf_counter() - self.begin:.0f} s"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of right-aligned columns, two spaces between them."""
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )

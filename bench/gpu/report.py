# SPDX-License-Identifier: Apache-2.0
"""What ran, what passed, what did not run and why; parts in processes that can be ended."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

WIDTH = 58
Figures = dict[str, Any]


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
        self.tell: Callable[[object], object] = lambda what: None
        """Hears the name of each check before it starts, and its row when it is done."""

    @property
    def left(self) -> float:
        """Seconds until the budget is used up."""
        return self.budget - (time.perf_counter() - self.begin)

    def check(self, name: str, work: Callable[[], object]) -> None:
        """Run a check and add its row; `work` raises if it fails, what it returns is shown."""
        self.tell(name)
        start, status, detail = time.perf_counter(), "passed", ""
        try:
            if self.left < 0:
                raise NotRun("out of time")
            detail = str(work() or "")
        except NotRun as reason:
            status, detail = "not run", str(reason)
        except Exception as error:  # every failure is a row of the report
            status, detail = "FAILED", f"{type(error).__name__}: {error}"
        self.add(name, status, detail, time.perf_counter() - start)

    def add(self, name: str, status: str, detail: str, took: float = 0) -> None:
        """A row that is known."""
        row = {"name": name, "status": status, "seconds": round(took, 2), "detail": detail}
        self.rows.append(row)
        self.tell(row)
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


@dataclass(frozen=True)
class Part:
    """Checks that share a process: one that hangs, or breaks the device's context, costs no other.

    Attributes:
        seconds: After which the process is killed.
        work: Adds rows to the report; what it returns are figures.
    """

    name: str
    seconds: float
    work: Callable[[Report], Figures | None]

    def run(self, report: Report) -> Figures:
        """In a process of its own, a fork of this one: it must not have touched the device."""
        limit, start = min(self.seconds, report.left), time.perf_counter()
        if limit <= 0:
            report.add(self.name, "not run", "out of time")
            return {}
        sys.stdout.flush()
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=self._there, args=(report, there), daemon=True)
        process.start()
        there.close()
        doing, begun = self.name, start
        while True:
            if not here.poll(max(0.0, start + limit - time.perf_counter())):
                ended = f"killed, as the part {self.name!r} took {limit:.0f} s"
                break
            try:
                what = here.recv()
            except EOFError:
                process.join()
                ended = f"the process ended with status {process.exitcode}"
                break
            if isinstance(what, str):
                doing, begun = what, time.perf_counter()
            elif isinstance(what, dict):
                report.rows.append(what)
            else:
                process.join()
                return dict(*what)
        process.kill()
        process.join()
        report.add(doing, "FAILED", ended, time.perf_counter() - begun)
        return {}

    def _there(self, report: Report, parent: Connection) -> None:
        report.tell = parent.send
        # What stops by itself, a little earlier, brings its figures home.
        report.budget -= max(0.0, report.left - self.seconds) + 0.1 * self.seconds
        parent.send((self.work(report) or {},))

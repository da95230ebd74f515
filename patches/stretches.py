# SPDX-License-Identifier: Apache-2.0
"""The clock of a measured rank: decode steps, cut at their collectives.

    compute 0 | collective 0 | compute 1 | collective 1 | ... | compute n

What the numbers mean is worked out by who asked for them (``bench/engine/trace.py``).
"""

from __future__ import annotations

import time
from typing import Any

MAX_STEPS = 20_000
"""Decode steps that a rank remembers; about 2 kB each at 32 layers."""


class StretchRecorder:
    """Decode steps of this rank since the last :meth:`take`."""

    def __init__(self) -> None:
        self.forwards = 0  # all passes, so that neighbouring steps can be told
        self._marks: list[tuple[float, float]] | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self._steps: list[tuple[int, int, list[tuple[float, float]]]] = []
        self._batch = self._largest = 0
        self.prefill_seconds = 0.0
        self.loads: list[list[float]] | None = None

    def begin(self, batch: int) -> None:
        """A decode step of ``batch`` requests begins."""
        self._batch, self._marks = batch, []
        self.mark()

    @property
    def in_step(self) -> bool:
        """Whether a decode step is being recorded."""
        return self._marks is not None

    def mark(self) -> None:
        """A stretch ends here: the clock and this thread's processor time."""
        if self._marks is not None:
            self._marks.append((time.perf_counter(), time.thread_time()))

    def end(self) -> bool:
        """The step ends; True if its batch was larger than any before."""
        self.mark()
        marks, self._marks = self._marks, None
        if marks is None:
            return False
        if len(self._steps) < MAX_STEPS:
            self._steps.append((self._batch, self.forwards, marks))
        larger = self._batch > self._largest
        self._largest = max(self._largest, self._batch)
        return larger

    def take(self) -> dict[str, Any]:
        """Everything recorded, in plain types, and start anew.

        ``steps``: of each its batch, the number of its forward pass, and its marks as (clock,
        processor time) in seconds. ``loads [L][R]``: kept tokens that each rank read at the largest
        batch; None without FairKV.
        """
        taken = {
            "steps": self._steps,
            "prefill_seconds": self.prefill_seconds,
            "loads": self.loads,
        }
        self._start_anew()
        return taken

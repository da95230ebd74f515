# SPDX-License-Identifier: Apache-2.0
"""Where the ranks' time goes in a decode step: recorded on each rank, summed up over all.

A decode step of one rank is cut at its collectives (the all-reduces of tensor parallelism):

    compute 0 | collective 0 | compute 1 | collective 1 | ... | compute n

All ranks leave a collective together, so a stretch of compute costs the group the slowest rank's
time. What a rank spends in a collective is communication plus waiting for slower ranks; the rank
that comes last does not wait, so the least time in a collective is communication.

Stretches are medians over steps *first* and compared over ranks after, so that only differences
that are there in every step count as imbalance, not the machine's noise.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_STEPS = 20_000
"""Decode steps that a rank remembers; about 1 kB each at 32 layers."""

CPU_QUANTILE = 0.1
"""Processor time of a stretch is the lowest decile over steps. The work of a stretch is the same in
every step; other processes can only add to its time (lost caches, shared memory bandwidth)."""

FloatArray = NDArray[np.float64]


@dataclass
class Step:
    """One decode step of one rank.

    Attributes:
        batch: Requests in the step.
        forward: Number of the forward pass, prefill passes counted, for finding neighbours.
        marks: The clock and the calling thread's processor time, in seconds, at the start and at
            the ends of the stretches in turn: compute 0, collective 0, compute 1, ...
    """

    batch: int
    forward: int
    marks: list[tuple[float, float]] = field(default_factory=list)


class Recorder:
    """The steps of this rank since the last :meth:`take`."""

    def __init__(self) -> None:
        self.forwards = 0
        self._step: Step | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self.steps: list[Step] = []
        self.prefill_seconds = 0.0
        self.loads: FloatArray | None = None
        self._largest = 0

    def begin(self, batch: int) -> None:
        """A decode step of ``batch`` requests begins."""
        self._step = Step(batch, self.forwards)
        self.mark()

    @property
    def in_step(self) -> bool:
        """Whether a decode step is being recorded."""
        return self._step is not None

    def mark(self) -> None:
        """A stretch ends here."""
        if self._step is not None:
            self._step.marks.append((time.perf_counter(), time.thread_time()))

    def end(self) -> bool:
        """The step ends; True if its batch was larger than any before."""
        self.mark()
        step, self._step = self._step, None
        if step is None:
            return False
        if len(self.steps) < MAX_STEPS:
            self.steps.append(step)
        larger = step.batch > self._largest
        self._largest = max(self._largest, step.batch)
        return larger

    def take(self) -> dict[str, Any]:
        """Everything recorded, as arrays, and start anew.

        Only steps with the most common number of collectives are kept.
        """
        usual = Counter(len(step.marks) for step in self.steps).most_common(1)
        steps = [step for step in self.steps if len(step.marks) == usual[0][0]]
        marks = np.array([step.marks for step in steps]) if steps else np.empty((0, 1, 2))
        wall, cpu = np.moveaxis(np.diff(marks, axis=1), 2, 0)
        data = {
            "batch": np.array([step.batch for step in steps], dtype=np.int64),
            "forward": np.array([step.forward for step in steps], dtype=np.int64),
            "start": marks[:, 0, 0],
            "wall": wall,
            "cpu": cpu,
            "prefill_seconds": self.prefill_seconds,
            "loads": self.loads,
        }
        self._start_anew()
        return data


def summarise(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' recordings (:meth:`Recorder.take`) in plain JSON types.

    Only steps of the largest batch count that at least a tenth of the steps have: the steady state.
    All times are milliseconds per decode step, lists are by rank:

    - ``period_ms``: from the start of a step to the start of the next, everything included;
    - ``step_ms``: the forward pass; ``collective_ms``: spent in collectives;
    - ``communication_ms``: sum over collectives of the least time that any rank spends in it;
    - ``waiting_ms``: the rest of a rank's time in collectives;
    - ``compute_ms``: outside of collectives, ``cpu_ms`` the processor time of that (lowest decile
      over steps, see ``CPU_QUANTILE``);
    - ``stretches_ms``, ``cpu_stretches_ms``: the same for each stretch, ``[rank][stretch]``;
    - ``slowest_ms``, ``even_ms``: sum over stretches of the slowest rank and of the mean rank, and
      ``removable_ms`` their difference: what perfect balance would save. The same with ``cpu_``
      from processor time, which other processes on the machine disturb less;
    - ``allowed_speedup``: ``period_ms / (period_ms - removable_ms)``;
    - ``rank_tokens``, ``balancedness``: kept tokens per rank at the largest batch, and sum over
      layers of the mean rank's over the fullest rank's (FairKV only).

    Raises:
        ValueError: if the ranks did not run the same steps.
    """
    prefill = [float(rank["prefill_seconds"]) for rank in ranks]
    counts = {len(rank["batch"]) for rank in ranks}
    if counts == {0}:
        return {"steps": 0, "prefill_s": prefill}
    if len(counts) != 1 or len({rank["wall"].shape for rank in ranks}) != 1:
        raise ValueError("the ranks ran different numbers of decode steps or collectives")
    if any((rank["batch"] != ranks[0]["batch"]).any() for rank in ranks):
        raise ValueError("the ranks ran decode steps of different batches")
    chosen = steady(ranks[0]["batch"])
    wall = np.stack([1e3 * rank["wall"][chosen] for rank in ranks])  # ms, [R, steps, 2n + 1]
    cpu = np.stack([1e3 * rank["cpu"][chosen] for rank in ranks])
    usual = np.median(wall, axis=1)  # [R, 2n + 1]
    compute, collective = usual[:, 0::2], usual[:, 1::2]
    cpu_compute = np.quantile(cpu, CPU_QUANTILE, axis=1)[:, 0::2]
    least = collective.min(axis=0)
    period = 1e3 * _period(ranks[0], chosen)
    slowest, even = float(compute.max(axis=0).sum()), float(compute.mean(axis=0).sum())
    cpu_slowest = float(cpu_compute.max(axis=0).sum())
    cpu_even = float(cpu_compute.mean(axis=0).sum())
    removable = slowest - even
    return {
        "steps": int(chosen.sum()),
        "batch": int(ranks[0]["batch"][chosen][0]),
        "peak_batch": int(ranks[0]["batch"].max()),
        "collectives": int(collective.shape[1]),
        "prefill_s": prefill,
        "period_ms": period,
        "step_ms": np.median(wall.sum(axis=2), axis=1).tolist(),
        "collective_ms": collective.sum(axis=1).tolist(),
        "communication_ms": float(least.sum()),
        "waiting_ms": (collective - least).sum(axis=1).tolist(),
        "compute_ms": compute.sum(axis=1).tolist(),
        "cpu_ms": cpu_compute.sum(axis=1).tolist(),
        "stretches_ms": compute.tolist(),
        "cpu_stretches_ms": cpu_compute.tolist(),
        "slowest_ms": slowest,
        "even_ms": even,
        "removable_ms": removable,
        "imbalance": slowest / even,
        "allowed_speedup": period / (period - removable),
        "cpu_slowest_ms": cpu_slowest,
        "cpu_even_ms": cpu_even,
        "cpu_imbalance": cpu_slowest / cpu_even if cpu_even > 0 else 1.0,
        **_load(ranks[0].get("loads")),
    }


def _load(loads: FloatArray | None) -> dict[str, Any]:
    """Tokens per rank and balancedness of resident tokens ``[L, R]``; nothing without FairKV."""
    if loads is None or not loads.size:
        return {}
    highest = float(loads.max(axis=1).sum())
    return {
        "rank_tokens": loads.sum(axis=0, dtype=np.float64).tolist(),
        "balancedness": float(loads.mean(axis=1).sum()) / highest if highest > 0 else 1.0,
    }


def steady(batch: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Steps of the largest batch that at least a tenth of the steps have."""
    sizes, counts = np.unique(batch, return_counts=True)
    often = sizes[counts >= 0.1 * len(batch)]
    chosen: NDArray[np.bool_] = batch == (often.max() if len(often) else sizes.max())
    return chosen


def _period(rank: dict[str, Any], chosen: NDArray[np.bool_]) -> float:
    """Median seconds between the starts of neighbouring chosen steps."""
    follows = (np.diff(rank["forward"]) == 1) & chosen[:-1] & chosen[1:]
    gaps = np.diff(rank["start"])[follows]
    if len(gaps):
        return float(np.median(gaps))
    return float(np.median(rank["wall"][chosen].sum(axis=1)))

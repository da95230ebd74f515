# SPDX-License-Identifier: Apache-2.0
"""Where the ranks' time goes in a decode step: from what ``patches/stretches.py`` records on each.

A decode step of one rank is cut at its collectives (the all-reduces of tensor parallelism):

    compute 0 | collective 0 | compute 1 | collective 1 | ... | compute n

All ranks leave a collective together, so a stretch of compute costs the group the slowest rank's
time. What a rank spends in a collective is communication plus waiting for slower ranks; the rank
that comes last does not wait, so the least time in a collective is communication.

Stretches are medians over steps *first* and compared over ranks after, so that only differences
that are there in every step count as imbalance, not the machine's noise.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

CPU_QUANTILE = 0.1
"""Processor time of a stretch is the lowest decile over steps. The work of a stretch is the same in
every step; other processes can only add to its time (lost caches, shared memory bandwidth)."""


def _arrays(recorded: dict[str, Any]) -> dict[str, Any]:
    """A rank's recording as arrays; only steps with the usual number of collectives count."""
    usual = Counter(len(marks) for _, _, marks in recorded["steps"]).most_common(1)
    steps = [step for step in recorded["steps"] if len(step[2]) == usual[0][0]]
    marks = np.array([step[2] for step in steps]) if steps else np.empty((0, 1, 2))
    wall, cpu = np.moveaxis(np.diff(marks, axis=1), 2, 0)
    batch, forward = (np.array([step[i] for step in steps], dtype=np.int64) for i in (0, 1))
    return {
        "batch": batch, "forward": forward, "start": marks[:, 0, 0], "wall": wall, "cpu": cpu
    }  # fmt: skip


def summarise(recorded: list[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' recordings (``StretchRecorder.take``) in plain JSON types.

    Only steps of the largest batch count that at least a tenth of the steps have: the steady state.
    All times are milliseconds per decode step, lists are by rank:

    - ``period_ms``: from the start of a step to the start of the next, everything included;
    - ``communication_ms``: sum over collectives of the least time that any rank spends in it;
    - ``waiting_ms``: the rest of a rank's time in collectives;
    - ``compute_ms``: outside of collectives, ``stretches_ms`` by stretch; with ``cpu_`` the
      processor time of that (lowest decile over steps), which other processes disturb less;
    - ``slowest_ms``, ``even_ms``: sum over stretches of the slowest rank and of the mean rank;
      ``imbalance`` is their ratio;
    - ``allowed_speedup``: ``period_ms`` over what it is without their difference, that is with
      perfect balance;
    - ``rank_tokens``, ``balancedness``: kept tokens per rank at the largest batch, and sum over
      layers of the mean rank's over the fullest rank's (FairKV only).

    Raises:
        ValueError: if the ranks did not run the same steps.
    """
    prefill = [float(rank["prefill_seconds"]) for rank in recorded]
    ranks = [_arrays(rank) for rank in recorded]
    first = ranks[0]
    if {len(rank["batch"]) for rank in ranks} == {0}:
        return {"steps": 0, "prefill_s": prefill}
    if any(rank["wall"].shape != first["wall"].shape for rank in ranks):
        raise ValueError("the ranks ran different numbers of decode steps or collectives")
    if any((rank["batch"] != first["batch"]).any() for rank in ranks):
        raise ValueError("the ranks ran decode steps of different batches")
    chosen = steady(first["batch"])
    wall, cpu = (np.stack([1e3 * rank[key][chosen] for rank in ranks]) for key in ("wall", "cpu"))
    usual = np.median(wall, axis=1)  # ms, [R, 2n + 1]
    compute, collective = usual[:, 0::2], usual[:, 1::2]
    least = collective.min(axis=0)
    period = 1e3 * _period(first, chosen)
    times: dict[str, Any] = {}
    for kind, values in (
        ("", compute), ("cpu_", np.quantile(cpu, CPU_QUANTILE, axis=1)[:, 0::2])
    ):  # fmt: skip
        slowest, even = float(values.max(axis=0).sum()), float(values.mean(axis=0).sum())
        times |= {
            f"{kind}stretches_ms": values.tolist(),
            f"{kind or 'compute_'}ms": values.sum(axis=1).tolist(),
            f"{kind}slowest_ms": slowest,
            f"{kind}even_ms": even,
            f"{kind}imbalance": slowest / even if even > 0 else 1.0,
        }
    return {
        "steps": int(chosen.sum()),
        "batch": int(first["batch"][chosen][0]),
        "peak_batch": int(first["batch"].max()),
        "collectives": int(collective.shape[1]),
        "prefill_s": prefill,
        "period_ms": period,
        "communication_ms": float(least.sum()),
        "waiting_ms": (collective - least).sum(axis=1).tolist(),
        **times,
        "allowed_speedup": period / (period - times["slowest_ms"] + times["even_ms"]),
        **_load(recorded[0]["loads"]),
    }


def _load(kept: list[list[float]] | None) -> dict[str, Any]:
    """Tokens per rank and balancedness of resident tokens ``[L, R]``; nothing without FairKV."""
    if not kept:
        return {}
    loads = np.array(kept)
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

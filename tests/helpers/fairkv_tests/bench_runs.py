# SPDX-License-Identifier: Apache-2.0
"""Runs as the engine benchmarks' worker gives them."""

from __future__ import annotations

from typing import Any


def measured(period: float, slowest: float, even: float, ranks: int = 2) -> dict[str, Any]:
    return {
        "steps": 10,
        "batch": 4,
        "peak_batch": 4,
        "period_ms": period,
        "communication_ms": 1.0,
        "waiting_ms": [slowest - even] * ranks,
        "compute_ms": [slowest] * ranks,
        "imbalance": slowest / even,
        "removable_ms": slowest - even,
        "allowed_speedup": period / (period - slowest + even),
        "cpu_slowest_ms": slowest,
        "cpu_even_ms": even,
        "cpu_imbalance": slowest / even,
    }


def a_run(seconds: float, period: float, slowest: float, even: float = 10.0) -> dict[str, Any]:
    return {
        "load": 0.1,
        "seconds": seconds,
        "output_tokens": 44,
        "prompt_tokens": 400,
        "ttft": [1.0, 3.0, 2.0],
        "itl": [0.02],
        "retractions": 0,
        "measured": measured(period, slowest, even),
        "max_total_tokens": 1000,
        "fairkv": None,
    }

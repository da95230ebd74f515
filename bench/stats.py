# SPDX-License-Identifier: Apache-2.0
"""Medians, ratios of paired runs, order of runs, and what a result says of its machine."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")
Spread = dict[str, float]
"""A median with what it was made from: quartiles and extremes of ``count`` values."""


def spread(values: Sequence[float]) -> Spread:
    """Spread of at least one finite value.

    Raises:
        ValueError: for no values, or values that are not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"a median needs at least one finite value, got {list(values)}")
    names = ("least", "quarter", "median", "three_quarters", "most")
    found = np.quantile(array, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return {**dict(zip(names, found, strict=True)), "count": array.size}


def show(figure: Spread, digits: int = 2) -> str:
    """``median [least..most]``; the median alone where there is nothing to compare."""
    text = f"{figure['median']:.{digits}f}"
    if figure["count"] < 2:
        return text
    return f"{text} [{figure['least']:.{digits}f}..{figure['most']:.{digits}f}]"


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Spread of ``values[i] / base[i]``: runs of the same round are compared, so that a slow phase
    of the machine hits both.

    Raises:
        ValueError: for lists of different length and for a base of 0.
    """
    if len(values) != len(base):
        raise ValueError(f"{len(values)} runs cannot be compared with {len(base)} in pairs")
    if any(x == 0 for x in base):
        raise ValueError("a run of the base has the value 0, there is no ratio")
    return spread([x / y for x, y in zip(values, base, strict=True)])


def rotated(items: Sequence[Item], round_index: int) -> list[Item]:
    """Order of a round: each item runs first, second, ... equally often over ``len(items)``
    rounds.
    """
    if not items:
        return []
    shift = round_index % len(items)
    return [*items[shift:], *items[:shift]]


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    result = {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "device": device,
        "load": list(os.getloadavg()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **versions("sglang", "torch", "numba", "fairkv-sglang"),
    }
    if device.startswith("cuda"):
        import torch

        result["gpu"] = torch.cuda.get_device_name(device)
    return result


def versions(*packages: str) -> dict[str, str]:
    """Versions of the packages that are installed."""
    installed = {name: next(iter(metadata.distributions(name=name)), None) for name in packages}
    return {name: found.version for name, found in installed.items() if found is not None}


def write(result: dict[str, Any], folder: Path, name: str) -> None:
    """``folder/name.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")

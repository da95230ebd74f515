# SPDX-License-Identifier: Apache-2.0
"""Kept tokens of real requests, for plans with samples and for the simulator."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.placement.options import FloatArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Requests:
    """Kept tokens ``[N, L, H]`` of N requests; ``context [N]`` numbers the distinct prompts."""

    kept: FloatArray
    context: IntArray
    model: str | None = None

    def halves(self) -> tuple[IntArray, IntArray]:
        """Indices of two halves that share no prompt: distinct prompts, in order, in turn."""
        even = self.context % 2 == 0
        return np.flatnonzero(even), np.flatnonzero(~even)


def read_requests(
    path: str | Path, budget: float = 1024.0, window: int = 32, floor: float = 0.2
) -> Requests:
    """Kept tokens per request, layer and head from a Tangram file (``profile_*.json``).

    What competes (kept - sink - protected window) is scaled to a mean of ``budget - window`` over
    the heads of each request, mixed with the floor that every head gets (Ada-KV, arXiv
    2407.11550: ``floor`` = 0.2 of the mean; 0 leaves the recorded skew as it is), and the
    window is added back. Prompts of equal length count as the same prompt, which at worst
    keeps two different ones in the same half; prompts are numbered by length.

    Raises ValueError with one line if the file or the numbers are not fit.
    """
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor must be between 0 and 1, got {floor}")
    if not 0 <= window < budget:
        raise ValueError(f"window must be >= 0 and below the budget {budget}, got {window}")
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        kept = np.array(data["kept"], dtype=np.float64)
        info = np.array(data["samples"], dtype=np.float64)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read requests {path}: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: not a file of requests; expected Tangram's JSON with 'kept' "
            "[samples, layers, heads] and 'samples' [samples, 4]"
        ) from None
    if kept.ndim != 3 or kept.size == 0 or info.shape != (len(kept), 4):
        raise ValueError(
            f"{path}: kept has the shape {kept.shape} and samples {info.shape}; expected "
            "[samples, layers, heads] and [samples, 4]"
        )
    if not np.isfinite(kept).all() or (kept < 0).any():
        raise ValueError(f"{path}: kept tokens must be finite and >= 0")
    competing = np.maximum(kept - (info[:, 1] + info[:, 3])[:, None, None], 0.0)
    mean = competing.mean(axis=(1, 2), keepdims=True)
    if (mean == 0).any():
        raise ValueError(f"{path}: a sample keeps nothing besides its sink and window")
    relative = floor + (1.0 - floor) * competing / mean
    context = np.unique(info[:, 0], return_inverse=True)[1].astype(np.int64)
    model = data.get("meta", {}).get("model_name")
    return Requests(window + (budget - window) * relative, context, model)

# SPDX-License-Identifier: Apache-2.0
"""Tangram: kept tokens per sample, layer and KV head, read out of a live engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fairkv_sglang.profiles.head_profile import HeadProfile, read_json


def read(
    path: Path,
    samples: Sequence[int] | None = None,
    mean_budget: int | None = None,
    window: int = 32,
) -> HeadProfile:
    """Mean over samples of the kept tokens that had to compete.

    Upstream protects a sink and a window of 4096 tokens in every head; they are subtracted, because
    they would hide the differences between heads. Each sample weighs the same, whatever its length.

    Args:
        path: The JSON file.
        samples: Which samples to average, by index; default all.
        mean_budget: If given, the shares are those of a cache with this mean budget, of which the
            last ``window`` tokens are kept by every head: window + competing tokens rescaled to
            ``mean_budget - window`` on average.
        window: See ``mean_budget``.
    """
    data = read_json(path)
    fields = ["context_tokens", "sink_tokens", "total_tokens", "protected_window"]
    if data.get("sample_fields", fields) != fields:
        raise ValueError(f"sample_fields are {data['sample_fields']}, expected {fields}")
    try:
        kept = np.array(data["kept"], dtype=np.float64)
        info = np.array(data["samples"], dtype=np.float64)
    except KeyError as error:
        raise ValueError(f"{error} missing") from None
    except (TypeError, ValueError):
        raise ValueError("kept or samples are ragged or hold something else than numbers") from None
    if kept.ndim != 3 or kept.size == 0 or info.shape != (len(kept), 4):
        raise ValueError(
            f"kept has shape {list(kept.shape)} and samples {list(info.shape)}, "
            "expected [samples, layers, heads] and [samples, 4]"
        )
    chosen = list(range(len(kept))) if samples is None else list(samples)
    if not chosen or min(chosen) < 0 or max(chosen) >= len(kept):
        raise ValueError(f"samples must be between 0 and {len(kept) - 1}, not {chosen}")
    sink, protected = info[chosen, 1], info[chosen, 3]
    competing = np.maximum(kept[chosen] - (sink + protected)[:, None, None], 0.0)
    mass = competing.sum(axis=(1, 2), keepdims=True)
    if (mass == 0).any():
        raise ValueError("a sample keeps nothing besides its sink and window")
    relative = (competing / mass * competing[0].size).mean(axis=0)
    if mean_budget is not None:
        if mean_budget <= window:
            raise ValueError(f"mean_budget {mean_budget} must exceed the window {window}")
        relative = window + (mean_budget - window) * relative
    upstream = data.get("meta")
    upstream = upstream if isinstance(upstream, dict) else {}
    meta = {
        "source": "https://github.com/aiha-lab/TANGRAM",
        "licence": "Apache-2.0",
        "scorer": upstream.get("scorer"),
        "threshold_scope": data.get("threshold_scope"),
        "samples": chosen,
        "tensor_parallel_size": upstream.get("tensor_parallel_size"),
    }
    name = upstream.get("model_name")
    return HeadProfile(str(name) if name else None, relative, meta)

# SPDX-License-Identifier: Apache-2.0
"""Real head profiles on models of another shape, and a synthetic one where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.profiles import HeadProfile, read_profile

SYNTHETIC_SIGMA = 1.0
"""Standard deviation of the synthetic profile's log shares; gives the imbalance of measured ones
(1.4 to 1.6 at TP 2)."""


def picked(count: int, available: int) -> NDArray[np.int64]:
    """``count`` of ``available`` indices, evenly spaced, each standing for its part of the range.

    With ``count > available`` indices repeat.
    """
    return ((np.arange(count) + 0.5) * available / count).astype(np.int64)


def map_profile(profile: HeadProfile, layers: int, kv_heads: int) -> HeadProfile:
    """The profile on a model of ``layers`` x ``kv_heads``: evenly spaced layers of the original, in
    each of them evenly spaced heads, scaled to sum to 1.

    Neighbouring heads stay neighbours, so contiguous placement meets what it would meet in the
    original.
    """
    if layers < 1 or kv_heads < 1:
        raise ValueError(f"a model needs layers and heads, not {layers} x {kv_heads}")
    rows = picked(layers, profile.num_layers)
    columns = picked(kv_heads, profile.num_kv_heads)
    shares = profile.shares[np.ix_(rows, columns)]
    meta = {**profile.meta, "mapped_from": [profile.num_layers, profile.num_kv_heads]}
    return HeadProfile(profile.model, shares, meta)


def synthetic_profile(layers: int, kv_heads: int, seed: int = 0) -> HeadProfile:
    """Log-normal shares, for machines without profile files."""
    generator = np.random.default_rng(seed)
    shares = generator.lognormal(0.0, SYNTHETIC_SIGMA, (layers, kv_heads))
    meta = {"source": "synthetic", "distribution": f"log-normal, sigma {SYNTHETIC_SIGMA}"}
    return HeadProfile(None, shares, meta)


def find_profile(path: Path | None, layers: int, kv_heads: int) -> HeadProfile:
    """The file's profile on the model's shape; a synthetic one without a file."""
    if path is None:
        return synthetic_profile(layers, kv_heads)
    return map_profile(read_profile(path), layers, kv_heads)

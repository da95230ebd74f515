# SPDX-License-Identifier: Apache-2.0
"""Kernels over head pages: numba on CPU, Triton and FlashInfer on CUDA, torch as the reference."""

from __future__ import annotations

from .ops import append, decode, grow, release, set_owned, snapkv_score, store_kept, warm_up
from .pages import PADDING_ROW, PAGE_TOKENS, HeadPages

__all__ = [
    "PADDING_ROW",
    "PAGE_TOKENS",
    "HeadPages",
    "append",
    "decode",
    "grow",
    "release",
    "set_owned",
    "snapkv_score",
    "store_kept",
    "warm_up",
]

# SPDX-License-Identifier: Apache-2.0
"""Head pages of a rank and the operations on them: numba on CPU, Triton and FlashInfer on CUDA."""

from __future__ import annotations

from .interface import Kernels
from .pages import PADDING_ROW, PAGE_TOKENS, HeadPages, kernels_for

__all__ = ["PADDING_ROW", "PAGE_TOKENS", "HeadPages", "Kernels", "kernels_for"]

# SPDX-License-Identifier: Apache-2.0
"""Operations on all prompts that end in a pass; see ``fairkv_sglang.kernels.interface``."""

from __future__ import annotations

from .score import snapkv_scores
from .select import pick, shared_counts
from .store import store_all_kept

__all__ = ["pick", "shared_counts", "snapkv_scores", "store_all_kept"]

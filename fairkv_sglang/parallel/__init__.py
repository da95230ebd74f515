# SPDX-License-Identifier: Apache-2.0
"""Rank remapper: what one tensor-parallel rank builds and loads under a placement plan."""

from fairkv_sglang.parallel.heads import RankHeads
from fairkv_sglang.parallel.remap import attention_kwargs, remap_weights

__all__ = ["RankHeads", "attention_kwargs", "remap_weights"]

# SPDX-License-Identifier: Apache-2.0
"""``contiguous``: what stock tensor parallelism does, heads in order, equal counts."""

from __future__ import annotations

import numpy as np

from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.problem import Problem


def contiguous(problem: Problem, options: PlanOptions) -> FloatArray:
    """Shares ``[L, R, H]``: rank r serves the r-th block of heads.

    With fewer heads than ranks each head goes to ``ranks / heads`` neighbouring ranks with equal
    shares, as SGLang replicates KV heads. Where the counts do not divide, which stock SGLang
    refuses, the blocks differ by at most one head (or one copy).
    """
    heads, ranks = problem.heads, problem.ranks
    layer = np.zeros((ranks, heads))
    if heads >= ranks:
        edges = np.arange(ranks + 1) * heads // ranks
        for rank in range(ranks):
            layer[rank, edges[rank] : edges[rank + 1]] = 1.0
    else:
        layer[np.arange(ranks), np.arange(ranks) * heads // ranks] = 1.0
        layer /= layer.sum(axis=0, keepdims=True)
    return np.repeat(layer[None], problem.layers, axis=0)

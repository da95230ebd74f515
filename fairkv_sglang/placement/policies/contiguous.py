# SPDX-License-Identifier: Apache-2.0
"""``contiguous``: what stock tensor parallelism does, heads in order, equal counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fairkv_sglang.placement.homes import blocks
from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.policies.base import POLICIES, Policy
from fairkv_sglang.placement.solver.problem import Problem


@POLICIES.register
@dataclass(frozen=True)
class Contiguous(Policy):
    """What stock tensor parallelism does, heads in order, equal counts."""

    name: ClassVar[str] = "contiguous"
    summary: ClassVar[str] = "heads in order, equal counts, as plain tensor parallelism"
    fixed: ClassVar[bool] = True

    def place(self, problem: Problem, options: PlanOptions) -> FloatArray:
        """Shares ``[L, R, H]``: rank r serves the r-th block of heads.

        With fewer heads than ranks each head goes to ``ranks / heads`` neighbouring ranks with
        equal shares, as SGLang replicates KV heads.
        """
        return np.repeat(blocks(problem.heads, problem.ranks)[None], problem.layers, axis=0)

# SPDX-License-Identifier: Apache-2.0
"""Placement policies, one file each; ``POLICIES`` maps their names to functions."""

from __future__ import annotations

from collections.abc import Callable

from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.policies.best_effort import best_effort
from fairkv_sglang.placement.policies.contiguous import contiguous
from fairkv_sglang.placement.policies.equal_shares import equal_shares
from fairkv_sglang.placement.policies.exact import exact
from fairkv_sglang.placement.policies.fair_copying import fair_copying
from fairkv_sglang.placement.solver.problem import Problem

Policy = Callable[[Problem, PlanOptions], FloatArray]

POLICIES: dict[str, Policy] = {
    "contiguous": contiguous,
    "best_effort": best_effort,
    "equal_shares": equal_shares,
    "fair_copying": fair_copying,
    "exact": exact,
}

__all__ = ["POLICIES", "Policy"]

# SPDX-License-Identifier: Apache-2.0
"""Placement of heads on tensor-parallel ranks: load model, policies, plan and router."""

from __future__ import annotations

from fairkv_sglang.placement.cost import CostModel
from fairkv_sglang.placement.make import make_plan
from fairkv_sglang.placement.options import PlanOptions
from fairkv_sglang.placement.plan import HeadShare, Plan
from fairkv_sglang.placement.planner import Planner
from fairkv_sglang.placement.policies import POLICIES
from fairkv_sglang.placement.router import Router

__all__ = [
    "POLICIES",
    "CostModel",
    "HeadShare",
    "Plan",
    "PlanOptions",
    "Planner",
    "Router",
    "make_plan",
]

# SPDX-License-Identifier: Apache-2.0
"""Placement policies, one file each."""

from __future__ import annotations

from fairkv_sglang.placement.policies.base import POLICIES, Policy
from fairkv_sglang.registry import import_all

import_all(__name__, __path__)

__all__ = ["POLICIES", "Policy"]

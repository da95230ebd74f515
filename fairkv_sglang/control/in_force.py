# SPDX-License-Identifier: Apache-2.0
"""The plan that decode follows, or is on its way to."""

from __future__ import annotations

from dataclasses import dataclass

from fairkv_sglang.placement import Plan


@dataclass
class PlanInForce:
    """Equal on all ranks at any time.

    Attributes:
        plan: The plan.
        source: Where it comes from: ``file``, ``profile``, ``even`` or ``traffic``.
    """

    plan: Plan
    source: str

    def adopt(self, plan: Plan) -> None:
        """A plan made from the traffic takes its place."""
        self.plan, self.source = plan, "traffic"

    @property
    def balancedness(self) -> float:
        """Mean over max of the ranks' tokens, as the plan expects it."""
        imbalance = self.plan.info.get("token_imbalance")
        return 1.0 / imbalance if isinstance(imbalance, float) and imbalance > 0 else 1.0

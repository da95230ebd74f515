# SPDX-License-Identifier: Apache-2.0
"""How plans are made: the settings that all plans of a server share, and its two kinds of input.

A plan at start is made from what heads are expected to keep, later ones from what requests kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field

from fairkv_sglang.placement.cost import CostModel
from fairkv_sglang.placement.make import make_plan
from fairkv_sglang.placement.modelled_step import modelled_step
from fairkv_sglang.placement.plan import Plan
from fairkv_sglang.placement.policies import POLICIES

REQUEST_SPREAD = 0.3
"""Coefficient of variation of a head's share of its layer's kept tokens between requests, from the
per-request counts of Tangram's four scorers on Llama-3.1-8B: 0.24 to 0.31 (docs/placement.md)."""


class Planner(BaseModel):
    """Makes plans; plain JSON, so that a process beside the server makes the same ones.

    Attributes:
        policy: Placement policy, a key of ``POLICIES``.
        options: Its options.
        tp_size: Ranks.
        cost: Turns tokens into step cost; None: a copy costs nothing.
        model: Name of the model, for the plan.
        slots: Lane slots of each (layer, rank); None: as many as a plan needs.
        paid: Slots cost as much unused as used: CUDA graphs keep shapes.
        varies: Requests differ from the mean, so that copies which leave the router room to even
            that out may pay for themselves. False for static budgets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str = "fair_copying"
    options: dict[str, Any] = {}
    tp_size: int = Field(ge=1)
    cost: CostModel | None = None
    model: str | None = None
    slots: int | None = None
    paid: bool = False
    varies: bool = True

    def from_expectation(self, loads: ArrayLike, measured: bool = False) -> Plan:
        """A plan for expected kept tokens ``loads [L, H]``.

        ``measured``: they are from a profile, around which requests spread.

        Raises:
            ValueError: in one line, for an unknown policy or limits that cannot be met.
        """
        return self._make(loads, spread=REQUEST_SPREAD if measured and self.varies else 0.0)

    def from_requests(self, kept: ArrayLike, served: ArrayLike | None = None) -> Plan:
        """A plan for requests like those that kept ``[N, L, H]`` tokens.

        ``served [L, R, H]``, the lanes of a running server, are kept where they are as good as
        others. Raises ValueError as :meth:`from_expectation`.
        """
        requests = np.asarray(kept, dtype=np.float64)
        return self._make(
            requests.mean(axis=0), samples=requests if self.varies else None, lanes=served
        )

    def step(self, served: ArrayLike, loads: ArrayLike) -> float:
        """Modelled decode step with the best use of the lanes ``served [L, R, H]``."""
        return modelled_step(served, loads, self.cost, self.slots if self.paid else None)

    def _make(
        self,
        loads: ArrayLike,
        spread: float = 0.0,
        samples: ArrayLike | None = None,
        lanes: ArrayLike | None = None,
    ) -> Plan:
        return make_plan(
            POLICIES.make(self.policy, **self.options),
            loads,
            self.tp_size,
            self.cost,
            self.model,
            samples=samples,
            lanes=lanes,
            spread=spread,
            max_lanes=self.slots,
            paid=self.paid and self.slots is not None,
        )

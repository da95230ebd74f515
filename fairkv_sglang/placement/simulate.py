# SPDX-License-Identifier: Apache-2.0
"""Replay of arrivals and departures through the router: the balance that requests really get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.placement.plan import Plan
from fairkv_sglang.placement.router import Router

Replan = Callable[[FloatArray], Plan]


class Traffic(BaseModel):
    """A closed loop of ``batch`` requests: each that leaves is replaced by a new one at once.

    Fields are flags of ``fairkv simulate``. Without ``exact`` the router is told the expectation
    scaled to the request and corrected after the prefill.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int = Field(default=32, ge=1, description="requests at a time")
    steps: int = Field(default=400, ge=1, description="decode steps")
    shortest: int = Field(default=64, ge=1, description="steps that a request stays, at least")
    longest: int = Field(default=512, ge=1, description="steps that a request stays, at most")
    length_spread: float = Field(
        default=0.0,
        ge=0.0,
        description="coefficient of variation of a log-normal factor on a request's kept tokens",
    )
    exact: bool = Field(
        default=False, description="kept tokens are known at admission, as with static budgets"
    )
    growth: bool = Field(
        default=False, description="every step adds a token to every head of every request"
    )
    seed: int = Field(default=0, description="of what is drawn")

    @model_validator(mode="after")
    def _ordered(self) -> Traffic:
        if self.shortest > self.longest:
            raise ValueError(f"shortest {self.shortest} must not be above longest {self.longest}")
        return self


@dataclass(frozen=True)
class Replay:
    """Outcome: fullest and mean rank summed over layers, per step ``[steps]``.

    plan: the last one. replanned, drained: the step of a new plan, and the first one in which no
    request from before it is left; ``steps`` if that did not happen.
    """

    fullest: FloatArray
    mean: FloatArray
    requests: int
    plan: Plan
    replanned: int
    drained: int

    @property
    def imbalance(self) -> float:
        """Sum over steps and layers of the fullest rank over the same of the mean; 1 is perfect."""
        return self.imbalance_of(slice(None))

    def imbalance_of(self, steps: slice) -> float:
        """The same of some steps."""
        return float(self.fullest[steps].sum() / self.mean[steps].sum())

    @property
    def series(self) -> FloatArray:
        """Imbalance of each step ``[steps]``."""
        return self.fullest / self.mean


def simulate(
    plan: Plan,
    kept: FloatArray,
    expected: FloatArray,
    traffic: Traffic,
    progress: Callable[[], object] | None = None,
    replan: tuple[int, Replan, FloatArray] | None = None,
) -> Replay:
    """Replay requests drawn from ``kept [N, L, H]`` on a plan.

    Args:
        plan: Lanes of the ranks.
        kept: Kept tokens of requests.
        expected: ``[L, H]``, what the router is told of a request before its prefill.
        traffic: Requests at a time, steps, how long they stay.
        progress: Called after every step.
        replan: After so many requests, the plan that a function makes of what they kept
            ``[n, L, H]`` replaces the first one, residents keep their owners, and requests are
            drawn from other ones ``[M, L, H]``; the router is told the mean of what was seen.

    Returns:
        The same for the same arguments.

    Raises:
        ValueError: for requests of another shape than the plan's.
    """
    shape = (plan.num_layers, plan.num_kv_heads)
    if kept.ndim != 3 or kept.shape[1:] != shape or len(kept) == 0:
        raise ValueError(f"kept must have the shape [requests, *{shape}], got {kept.shape}")
    rng = np.random.default_rng(traffic.seed)
    router = Router(plan)
    grown = np.zeros((plan.num_layers, plan.tp_size))
    owned: dict[int, FloatArray] = {}  # heads of a request on each rank [L, R]
    leaves: dict[int, int] = {}
    born: dict[int, int] = {}
    sigma = float(np.sqrt(np.log1p(traffic.length_spread**2)))
    fullest, mean = np.zeros(traffic.steps), np.zeros(traffic.steps)
    key, seen = 0, []
    replanned = drained = traffic.steps
    ranks = np.arange(plan.tp_size)
    for step in range(traffic.steps):
        for gone in [k for k, end in leaves.items() if end <= step]:
            router.release(gone)
            grown -= owned[gone] * (step - born[gone])
            del leaves[gone], owned[gone], born[gone]
        while len(leaves) < traffic.batch:
            factor = float(np.exp(sigma * rng.standard_normal() - 0.5 * sigma**2))
            exact = kept[int(rng.integers(len(kept)))] * factor
            owners = router.admit(key, exact if traffic.exact else expected * factor)
            router.update(key, exact)
            seen.append(exact)
            stay = int(rng.integers(traffic.shortest, traffic.longest + 1))
            # the first batch is found in mid-life, or it would all leave together
            leaves[key] = step + (stay if step else int(rng.integers(1, stay + 1)))
            owned[key] = (owners[:, :, None] == ranks).sum(axis=1).astype(np.float64)
            born[key] = step
            key += 1
            if replan is not None and key == replan[0]:
                plan = replan[1](np.stack(seen))
                router.set_lanes(plan.shares() > 0)
                expected, kept, replanned = np.mean(seen, axis=0), replan[2], step
        if replan is not None and step < drained and min(leaves) >= replan[0]:
            drained = step
        load = router.loads() + (grown if traffic.growth else 0.0)
        fullest[step], mean[step] = load.max(axis=1).sum(), load.mean(axis=1).sum()
        for lanes in owned.values() if traffic.growth else ():
            grown += lanes
        if progress is not None:
            progress()
    return Replay(fullest, mean, key, plan, replanned, drained)

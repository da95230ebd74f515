# SPDX-License-Identifier: Apache-2.0
"""What a placement policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from fairkv_sglang.placement.options import FloatArray, PlanOptions
from fairkv_sglang.placement.solver.problem import Problem
from fairkv_sglang.registry import Registry, option


@dataclass(frozen=True)
class Policy(ABC):
    """Gives heads, and shares of copied heads, to ranks.

    A policy is a frozen dataclass; fields made by :func:`fairkv_sglang.registry.option` are its
    options. ``place`` is a function of its arguments alone: all ranks get the same plan.

    Attributes:
        name: Key in ``POLICIES`` and value of ``--fairkv-placement``.
        summary: What it does, in a few words, for ``--help``.
        fixed: Whether heads stay where plain tensor parallelism has them: there is one such plan.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    fixed: ClassVar[bool] = False

    @abstractmethod
    def place(self, problem: Problem, options: PlanOptions) -> FloatArray:
        """Shares ``[L, R, H]`` within the limits of ``options``; those of a head sum to 1."""


@dataclass(frozen=True)
class Copying(Policy):
    """A policy that copies heads."""

    max_copies: int | None = option(
        None,
        "Most copies of heads in a layer (default: as many as pay for themselves).",
        ge=0,
    )

    def limited(self, options: PlanOptions) -> PlanOptions:
        """``options`` with the policy's own limit, if it has one."""
        if self.max_copies is None:
            return options
        return options.model_copy(update={"max_copies_per_layer": self.max_copies})


POLICIES: Registry[Policy] = Registry("placement policy", "fairkv_sglang.placements")

# SPDX-License-Identifier: Apache-2.0
"""What is compared: stock SGLang, and FairKV by placement; the same KV memory for all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One way of serving.

    Attributes:
        name: Its name in flags, tables and files.
        text: One line for people.
        placement: FairKV's policy; None for stock SGLang.
        scope: Budget scope instead of the run's own.
        flags: Whether stock SGLang gets the flags that FairKV needs.
        keep_all: FairKV keeps the whole prompt (its kernels without its budgets).
    """

    name: str
    text: str
    placement: str | None = None
    scope: str | None = None
    flags: bool = False
    keep_all: bool = False

    @property
    def has_budget(self) -> bool:
        """Whether the budget matters to this variant."""
        return self.placement is not None and not self.keep_all


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("stock", "SGLang, full KV, default flags"),
        Variant("stock-flags", "SGLang, full KV, the flags that FairKV needs", flags=True),
        Variant("contiguous", "budgets, plain tensor parallelism", "contiguous"),
        Variant("best_effort", "budgets, heads placed by load, no copies", "best_effort"),
        Variant("equal_shares", "budgets, fair-copying with equal shares", "equal_shares"),
        Variant("fair_copying", "budgets, fair-copying", "fair_copying"),
        Variant("rank_local", "each rank has its own budget", "contiguous", scope="rank"),
        Variant("full", "FairKV's kernels, full KV", "contiguous", "uniform", keep_all=True),
    )
}

DEFAULT = tuple(name for name in VARIANTS if name != "full")
"""What runs if nothing is named; ``full`` tells what part of a gain over stock is the kernels'."""

BASE = "contiguous"
"""Balancing is measured against this variant."""

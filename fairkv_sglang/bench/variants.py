# SPDX-License-Identifier: Apache-2.0
"""What is compared: stock SGLang, and FairKV by placement; the same KV memory for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
    )
}
"""The variants of a run, by default all."""

EXTRA: dict[str, Variant] = {
    "full": Variant("full", "FairKV's kernels, full KV", "contiguous", "uniform", keep_all=True),
}
"""Further variants that can be named: what part of a gain over stock comes from the kernels."""

BASE = "contiguous"
"""Balancing is measured against this variant."""


def by_name(name: str) -> Variant:
    """The variant of a name that :func:`known` has."""
    return VARIANTS.get(name) or EXTRA[name]


def known() -> tuple[str, ...]:
    """All names."""
    return (*VARIANTS, *EXTRA)


def stock_flags(on_cuda: bool) -> dict[str, Any]:
    """Server arguments of SGLang that FairKV sets or needs, as far as stock SGLang has them."""
    return {
        "attention_backend": "flashinfer" if on_cuda else "torch_native",
        "disable_prefill_cuda_graph": True,
    }


def fairkv_options(
    variant: Variant, shared: dict[str, Any], budget: dict[str, Any], scope: str
) -> dict[str, Any] | None:
    """FairKV's options of a variant; None for stock.

    Args:
        variant: The variant.
        shared: Options of all variants.
        budget: ``{"budget": tokens}`` or ``{"ratio": share}``.
        scope: The run's budget scope.
    """
    if variant.placement is None:
        return None
    chosen = {"ratio": 1.0} if variant.keep_all else budget
    options = {**shared, **chosen, "placement": variant.placement, "scope": variant.scope or scope}
    if options["scope"] in ("uniform", "rank"):
        # Neither uses the profile, and plain tensor parallelism does not ask for one.
        options.pop("profile", None)
    return options

# SPDX-License-Identifier: Apache-2.0
"""Inputs that every policy shares: checked loads and the options of a plan."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FloatArray = NDArray[np.float64]
Model = TypeVar("Model", bound=BaseModel)

SPARE_LANES = 1
"""Spare lanes of a (layer, rank) beside its home heads. With one no more than 1 % of the modelled
step is left to gain, and the next slot's weights cost more than that (docs/placement.md)."""


class PlanOptions(BaseModel):
    """Limits and targets of a plan; all are optional.

    tolerance: balance aimed at when a copy costs nothing: sum over layers of the fullest rank over
        sum of the mean rank.
    max_copies_per_layer: limit on copies, lanes beyond one per head; with fewer heads than ranks
        the unavoidable ones (ranks - heads) count as well.
    max_lanes: lane slots, limit on the lanes of a rank in a layer.
    paid: every slot costs a lane, used or not (CUDA graphs keep shapes); a copy then costs nothing
        more until the slots are used up.
    spread: coefficient of variation of a head's load between batches. Above 0 (or with samples
        of requests) ``fair_copying`` adds spare copies that give the router room
        (``solver/spare.py``).
    time_limit: of ``exact``, seconds per layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tolerance: float = Field(default=1.02, ge=1.0)
    max_copies_per_layer: int | None = Field(default=None, ge=0)
    max_lanes: int | None = Field(default=None, ge=1)
    paid: bool = False
    spread: float = Field(default=0.0, ge=0.0)
    time_limit: float = Field(default=5.0, gt=0.0)

    @model_validator(mode="after")
    def _bounded(self) -> PlanOptions:
        if self.paid and self.max_lanes is None:
            raise ValueError("slots that are paid for need their number, max_lanes")
        return self

    def most_copies(self, most: int) -> int:
        """Copies that a layer may have if ``most`` are of use."""
        limit = self.max_copies_per_layer
        return most if limit is None else min(most, limit)

    def slots(self, heads: int) -> int:
        """Lanes of a rank in a layer, at most."""
        return heads if self.max_lanes is None else min(heads, self.max_lanes)


def checked(model: type[Model], **values: Any) -> Model:
    """``model(**values)``, with pydantic's report cut to one line that names the field."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(model.model_fields)
        if first["type"] == "extra_forbidden":
            raise ValueError(f"unknown option {name!r}; known: {known}") from None
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ValueError(f"{name}: {message}" if name else message) from None


def check_loads(loads: ArrayLike, tp_size: int) -> FloatArray:
    """Return ``loads`` as float64 ``[L, H]`` or raise ValueError with one line."""
    if tp_size < 1:
        raise ValueError(f"tp_size must be at least 1, got {tp_size}")
    try:
        array = np.array(loads, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("loads must be numbers in the shape [layers, heads]") from None
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"loads must have the shape [layers, heads] with at least one of each, "
            f"got {array.shape}"
        )
    bad = ~np.isfinite(array)
    if bad.any():
        layer, head = np.argwhere(bad)[0]
        raise ValueError(
            f"load of layer {layer}, head {head} is {array[layer, head]}; loads must be finite"
        )
    if (array < 0).any():
        layer, head = np.argwhere(array < 0)[0]
        raise ValueError(
            f"load of layer {layer}, head {head} is {array[layer, head]}; loads must be >= 0"
        )
    return array


def check_samples(samples: ArrayLike, loads: FloatArray) -> FloatArray:
    """Return ``samples`` as float64 ``[N, L, H]`` fitting ``loads``, or raise ValueError."""
    array = np.array(samples, dtype=np.float64)
    if array.ndim != 3 or array.shape[1:] != loads.shape or len(array) == 0:
        raise ValueError(
            f"samples must have the shape [requests, {loads.shape[0]}, {loads.shape[1]}], "
            f"got {array.shape}"
        )
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError("samples must be finite and >= 0")
    return array

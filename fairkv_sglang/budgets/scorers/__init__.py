# SPDX-License-Identifier: Apache-2.0
"""Scorers: the importance of each cached token of a head. One file each."""

from __future__ import annotations

from typing import Any

from fairkv_sglang.budgets.scorers.base import SCORERS, Scorer
from fairkv_sglang.registry import import_all

import_all(__name__, __path__)


def make_scorer(name: str, **options: Any) -> Scorer:
    """The scorer of this name; ValueError that lists the valid names or options."""
    return SCORERS.make(name, **options)


__all__ = ["SCORERS", "Scorer", "make_scorer"]

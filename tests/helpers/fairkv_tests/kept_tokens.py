# SPDX-License-Identifier: Apache-2.0
"""Counts and positions in one call, as a rank that has all scores finds them."""

from __future__ import annotations

from fairkv_sglang.budgets import pick


def select(scope, layer, heads, scores, prompt_len):
    """``Kept`` of the given heads of a layer; arguments as of ``BudgetScope.counts``."""
    return pick(scores, scope.counts(layer, heads, scores, prompt_len), prompt_len)

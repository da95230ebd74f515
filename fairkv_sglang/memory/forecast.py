# SPDX-License-Identifier: Apache-2.0
"""What a prompt will probably take, by the last prompts: less than the most that it could.

A forecast may be wrong, so whoever charges it sees to it that a prompt takes no more than that
(``RowBook``). All of it is arithmetic with whole numbers, equal on all ranks to the last bit.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.budgets import BudgetScope
from fairkv_sglang.memory.page_ledger import PAGE_TOKENS, Pages

LEAST_SEEN = 16
"""Compressed prompts from which on a new one is charged what they let expect."""
DEVIATIONS = 4
"""Standard deviations above the mean that are charged.

Of whatever distribution, at most 1/17 lies above that (Cantelli's inequality). Fewer cost more, by
what comes back, than they leave free (docs/performance.md).
"""


def forecast_pages(
    scope: BudgetScope,
    seen: NDArray[np.int64],
    prompt_len: int,
    owners: NDArray[np.integer],
    ranks: int,
) -> Pages:
    """``[R]`` pages that a prompt of ``prompt_len`` tokens stays within nearly always.

    Each recorded prompt says how a layer's tokens are shared out over its heads (the model's over
    all heads, where the scope has one budget for all layers). With this
    prompt's tokens and owners that gives its pages on each rank: their mean over the recorded
    prompts and :data:`DEVIATIONS` times their standard deviation. Rounded up.

    Args:
        scope: Budget scope.
        seen: ``[n, L, H]`` kept tokens of n >= 1 recorded prompts.
        prompt_len: Tokens of the prompt.
        owners: ``[L, H]`` rank that serves each head for it.
        ranks: R.
    """
    kept = seen.reshape(len(seen), scope.budgets, -1)
    caps = scope.per_head_bound(prompt_len).reshape(scope.budgets, -1)
    total = scope.expected(prompt_len).reshape(scope.budgets, -1).sum(axis=1)[:, None]  # [L, 1]
    of_part = np.maximum(kept.sum(axis=2, keepdims=True), 1)
    tokens = np.minimum(-(-kept * total // of_part), caps)
    pages = (-(-tokens // PAGE_TOKENS)).reshape(len(seen), -1)
    mine = owners.ravel()[:, None] == np.arange(ranks)
    of_rank = pages @ mine.astype(np.int64)  # [n, R]
    n, once, squared = len(seen), of_rank.sum(axis=0), (of_rank**2).sum(axis=0)
    spread = [isqrt(DEVIATIONS**2 * int(v)) for v in n * squared - once**2]
    forecast: Pages = -(-(once + np.array(spread, dtype=np.int64)) // n)
    return forecast

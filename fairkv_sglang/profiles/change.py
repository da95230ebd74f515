# SPDX-License-Identifier: Apache-2.0
"""Has the traffic changed? The requests since it last did."""

from __future__ import annotations

import numpy as np

from fairkv_sglang.profiles.head_profile import FloatArray

CHANGED = 16.0
"""Score of a change. Without one, 99 of 100 windows of 64 recorded prompts stay below 12, below 13
where two tasks are mixed at random; real changes score 45 and more (docs/replanning.md)."""
NEWEST, OLDEST = 8, 4
"""Requests that there must be after a change, and before it."""


def since_change(requests: FloatArray) -> FloatArray:
    """The newest of ``requests [N, L, H]`` (kept tokens, oldest first) that are of one kind.

    For each place where the window could be cut in two: the squared distance between the mean
    shares of both parts, as an analysis of variance weighs it, over the variance within the parts.
    The best cut counts as a change if that is above ``CHANGED``; then the newer part is looked at
    in the same way. Shares of a layer, because a longer prompt is not another kind.
    """
    while len(requests) >= NEWEST + OLDEST:
        total = requests.sum(axis=2, keepdims=True)
        shares = np.divide(requests, total, out=np.zeros_like(requests), where=total > 0)
        table = shares.reshape(len(shares), -1)
        count, sums = len(table), table.cumsum(axis=0)
        before = np.arange(1, count)
        apart = sums[:-1] / before[:, None] - (sums[-1] - sums[:-1]) / (count - before)[:, None]
        between = before * (count - before) / count * (apart**2).sum(axis=1)
        whole = (table**2).sum() - (sums[-1] ** 2).sum() / count
        score = between / np.maximum((whole - between) / (count - 2), 1e-12)
        score[: OLDEST - 1] = score[count - NEWEST :] = 0.0
        cut = int(score.argmax())
        if score[cut] <= CHANGED:
            break
        requests = requests[cut + 1 :]
    return requests

# SPDX-License-Identifier: Apache-2.0
"""Which layers share an exchange where it does not run beside the computation."""

from __future__ import annotations

from collections.abc import Sequence

EXCHANGED_BYTES = 32 << 20
"""Scores and kept rows, of all ranks, that are gathered for one exchange; a larger layer is one of
its own.
"""


def alone(count: int) -> list[range]:
    """Each of ``count`` layers."""
    return [range(i, i + 1) for i in range(count)]


def groups(sizes: Sequence[int], limit: int) -> list[range]:
    """Neighbours that together have no more than ``limit``, as many as fit, in order.

    What has size 0 everywhere gains nothing by waiting for others: then each is a group.
    """
    if not any(sizes):
        return alone(len(sizes))
    found, first, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > first and total + size > limit:
            found.append(range(first, i))
            first, total = i, 0
        total += size
    found.append(range(first, len(sizes)))
    return found

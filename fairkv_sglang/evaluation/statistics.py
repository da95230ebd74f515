# SPDX-License-Identifier: Apache-2.0
"""How sure a share is, and how far two runs of the same samples are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

LEAST_MASS = 1e-6
"""Probability that no set of tokens is taken to be below: top lists are rounded."""


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a share, Wilson's; 95 % by default. (0, 1) without samples."""
    if count == 0:
        return 0.0, 1.0
    share, extra = right / count, z * z / count
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / count + extra / count / 4)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def sign_test(lost: int, won: int) -> float:
    """Chance of a difference at least this large if both runs were equally good (McNemar, exact).

    Args:
        lost: Samples that only the first run has right.
        won: Samples that only the second run has right.
    """
    count, less = lost + won, min(lost, won)
    tail = sum(math.comb(count, i) for i in range(less + 1))
    return min(1.0, 2 * tail / 2**count)


def agreement(first: Sequence[str], second: Sequence[str]) -> float:
    """Share of the longer answer before the two part; 1.0 for two empty ones."""
    longest = max(len(first), len(second))
    return same_tokens(first, second) / longest if longest else 1.0


def same_tokens(first: Sequence[str], second: Sequence[str]) -> int:
    """Tokens before two answers part."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def divergence(full: Mapping[str, float], other: Mapping[str, float]) -> float:
    """KL(full || other) in nats of one token, from two lists of the most probable tokens.

    A lower bound: joining outcomes never adds to a divergence, so tokens that are in both lists
    count one by one and the rest in two groups. The first group are the tokens of ``full``'s list
    alone; to ``other`` they have at most what its own list leaves, and each of them at most the
    probability of the last one there.

    Args:
        full, other: Token -> log probability.
    """
    both = full.keys() & other.keys()
    pairs = [(math.exp(full[token]), math.exp(other[token])) for token in sorted(both)]
    alone = sum(math.exp(full[token]) for token in sorted(full.keys() - both))
    p_rest, q_rest = (max(1 - sum(pair[i] for pair in pairs), 0.0) for i in (0, 1))
    p_rest = max(p_rest - alone, 0.0)
    # What is known of the first group allows it this much; the divergence is least at a share of
    # the rest as large as in ``full``.
    least = math.exp(min(other.values(), default=0.0))
    left = max(1 - sum(map(math.exp, other.values())), 0.0)
    allowed = min(left, len(full.keys() - both) * least)
    q_alone = min(allowed, q_rest * alone / max(alone + p_rest, LEAST_MASS))
    pairs += [(alone, q_alone), (p_rest, q_rest - q_alone)]
    safe = [(p, max(q, LEAST_MASS)) for p, q in pairs if p > LEAST_MASS]
    return max(sum(p * math.log(p / q) for p, q in safe), 0.0)

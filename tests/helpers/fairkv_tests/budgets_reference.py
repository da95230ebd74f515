# SPDX-License-Identifier: Apache-2.0
"""Kept sets written straight from the papers' formulae: slow loops, no code of the package.

SnapKV: arXiv 2404.14469, listing 1 (with the mean over the window). Ada-KV: arXiv 2407.11550,
algorithm 1, with the safeguard as kvpress has it.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def snapkv_scores(q, k, *, window, kernel, pooling, scale):
    """[n, N - window] float64 from q [W', n, g, D] and k [N, n, D] (numpy, any float)."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    rows, heads, group, _ = q.shape
    total = k.shape[0]
    scored = max(total - window, 0)
    result = np.zeros((heads, scored))
    for head in range(heads):
        for member in range(group):
            mean = [0.0] * scored
            for row in range(rows):
                position = total - rows + row
                logits = [
                    float(q[row, head, member] @ k[token, head]) * scale
                    for token in range(position + 1)
                ]
                top = max(logits)
                weights = [math.exp(value - top) for value in logits]
                mass = sum(weights)
                for token in range(scored):
                    mean[token] += weights[token] / mass / rows
            for token in range(scored):
                near = range(token - kernel // 2, token + kernel // 2 + 1)
                inside = [mean[t] for t in near if 0 <= t < scored]
                pooled = max(inside) if pooling == "max" else sum(inside) / kernel
                result[head, token] += pooled / group
    return result


def best(scores, keep):
    """Positions of the ``keep`` best of a list: higher score first, then lower position."""
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    return sorted(order[:keep])


def with_window(positions, scored, total):
    return [*positions, *range(scored, total)]


def static_kept(scores, counts, total):
    """Kept positions per head when head i keeps counts[i] tokens, window included."""
    kept = []
    for row, count in zip(scores, counts, strict=True):
        window = total - len(row)
        kept.append(with_window(best(row, count - window), len(row), total))
    return kept


def ada_kv_kept(scores, heads, budget, window, alpha, total):
    """Kept positions per row; rows compete for len(heads) * (budget - window) tokens, but for the
    best that each keeps to have its share alpha of the budget.
    """
    if budget >= total:
        return [list(range(total)) for _ in heads]
    floor = max(int(Fraction(str(alpha)) * budget) - window, 0)
    own = [best(row, floor) for row in scores]
    pool = sorted(
        (-value, head, token)
        for head, row, mine in zip(heads, scores, own, strict=True)
        for token, value in enumerate(row)
        if token not in mine
    )[: len(heads) * (budget - window - floor)]
    counts = {head: window + floor for head in heads}
    for _, head, _ in pool:
        counts[head] += 1
    return static_kept(scores, [counts[head] for head in heads], total)


def threshold_kept(scores, budget, window, total, threshold, alpha, sink):
    """Kept positions per head: what scores above the threshold, with a floor and a cap."""
    if budget >= total:
        return [list(range(total)) for _ in scores]
    beyond = budget - window
    floor = min(max(int(Fraction(str(alpha)) * budget) - window, sink, 1), beyond)
    above = [sum(value > threshold for value in row) for row in scores]
    counts = [window + min(max(number, floor), beyond) for number in above]
    return static_kept(scores, counts, total)


def water_level(shares, total, low, high):
    """clip(level * share, low, high) summing to total, by bisection; shares must be positive."""
    below, above = 0.0, high / min(shares)
    for _ in range(200):
        level = (below + above) / 2
        if sum(min(max(level * share, low), high) for share in shares) < total:
            below = level
        else:
            above = level
    return [min(max(above * share, low), high) for share in shares]

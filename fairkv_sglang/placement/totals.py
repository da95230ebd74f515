# SPDX-License-Identifier: Apache-2.0
"""Which rank takes which part of a layer: free for step time, decisive for memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.placement.problem import Problem

_SWEEPS = 8


def even_totals(problem: Problem, shares: FloatArray, even_copies: bool = False) -> FloatArray:
    """Permute the ranks within each layer so that token totals over the layers are even.

    The fullest part of a layer goes to the rank that holds least so far, layers with the widest
    spread first; then each layer is taken out and dealt again while the fullest rank falls.
    ``even_copies`` evens the number of copies first (for a limit on copies per rank).
    """
    tokens = np.einsum("lrh,lh->lr", shares, problem.tokens)
    copies = _copies(shares) if even_copies else np.zeros_like(tokens)
    spread = tokens.max(axis=1) - tokens.min(axis=1)
    order = np.argsort(-spread, kind="stable")
    held, held_copies = np.zeros(problem.ranks), np.zeros(problem.ranks)
    # where[l, r]: the part of layer l that rank r takes
    where = np.zeros(tokens.shape, dtype=np.int64)

    def deal(layer: int, base: FloatArray, base_copies: FloatArray) -> NDArray[np.int64]:
        parts = np.lexsort((-tokens[layer], -copies[layer]))
        ranks = np.lexsort((base, base_copies))
        row = np.zeros(problem.ranks, dtype=np.int64)
        row[ranks] = parts
        return row

    for layer in order:
        where[layer] = deal(layer, held, held_copies)
        held += tokens[layer, where[layer]]
        held_copies += copies[layer, where[layer]]
    for _ in range(0 if even_copies else _SWEEPS):
        before = held.max()
        for layer in order:
            base = held - tokens[layer, where[layer]]
            row = deal(layer, base, held_copies)
            after = base + tokens[layer, row]
            if after.max() < held.max() or (after.max() == held.max() and _sq(after) < _sq(held)):
                where[layer], held = row, after
        if held.max() >= before * (1 - 1e-6):
            break
    return np.take_along_axis(shares, where[:, :, None], axis=1)


def copies_of_ranks(shares: FloatArray) -> FloatArray:
    """Copies ``[R]`` over all layers; a head on c ranks counts (c - 1) / c on each of them."""
    count: FloatArray = _copies(shares).sum(axis=0)
    return count


def _copies(shares: FloatArray) -> FloatArray:
    served = (shares > 0).astype(np.float64)
    count: FloatArray = (served * (1.0 - 1.0 / served.sum(axis=1, keepdims=True))).sum(axis=2)
    return count


def _sq(values: FloatArray) -> float:
    return float((values * values).sum())

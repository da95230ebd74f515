# SPDX-License-Identifier: Apache-2.0
"""Deterministic top-k: higher score first, then lower head, then lower token position.

``torch.topk`` leaves open which of several equal entries it returns. Here only threshold *values*
are taken from it (those are unique); which of the entries equal to the threshold are kept is then
decided in order of position. So every rank, device and placement keeps the same tokens.

NaN scores count as minus infinity: the number of kept tokens, on which the memory accounting of all
ranks rests, never depends on the scores being sane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Kept:
    """Kept tokens of one layer of one prompt, one row per head.

    Attributes:
        counts: int64 [n], kept tokens per head, window included.
        indices: int64 [n, max(counts)], ascending token positions, then -1.
    """

    counts: Tensor
    indices: Tensor


def without_nan(scores: Tensor) -> Tensor:
    """Scores with NaN replaced by minus infinity."""
    return torch.where(scores.isnan(), -torch.inf, scores)


def top_mask(scores: Tensor, keep: Tensor, most: int) -> Tensor:
    """Marks the best entries of each row.

    Args:
        scores: [n, M] without NaN.
        keep: int64 [n], how many of each row, between 0 and ``most``.
        most: Upper bound of ``keep``, at most M.

    Returns:
        bool [n, M] with exactly ``keep`` entries set per row; among equal scores the first ones.
    """
    if most == 0 or scores.shape[1] == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    best = torch.topk(scores, most, dim=1, sorted=True).values
    threshold = best.gather(1, (keep - 1).clamp(min=0)[:, None])
    above = scores > threshold
    missing = keep - above.sum(dim=1)
    tied = scores == threshold
    return above | (tied & (tied.cumsum(dim=1) <= missing[:, None]))


def pick(scores: Tensor, counts: Tensor, prompt_len: int, width: int | None = None) -> Kept:
    """The kept positions when head i keeps ``counts[i]`` tokens.

    The tokens behind the scored ones (the window) are always kept; the rest of the count goes to
    the best scored tokens.

    Args:
        scores: [n, M] of the first M tokens of the prompt.
        counts: int64 [n] on the scores' device, window included: between prompt_len - M and
            prompt_len.
        prompt_len: N >= M; the window is the last N - M tokens.
        width: max(counts) if known on the host; saves a device synchronisation.

    Raises:
        ValueError: on a CPU, for a count outside of these bounds; a scope may be the cause.
    """
    if width is None:
        width = int(counts.max()) if len(counts) else 0
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        from fairkv_sglang.budgets import selection_cpu  # compiled: not where flags are read

        least, most = prompt_len - scores.shape[1], min(width, prompt_len)
        for count in (counts.min(), counts.max()) if len(counts) else ():
            if not least <= count <= most:  # compiled code would write beside the table
                raise ValueError(f"a head keeps {least} to {most} tokens here, not {int(count)}")
        indices = selection_cpu.pick(scores.numpy(), counts.numpy(), prompt_len, width)
        return Kept(counts=counts, indices=torch.from_numpy(indices))
    return Kept(counts=counts, indices=picked(scores, counts, prompt_len, width))


def picked(scores: Tensor, counts: Tensor, prompt_len: int, width: int) -> Tensor:
    """Indices of :func:`pick` in torch, on any device."""
    n, m = scores.shape
    window = prompt_len - m
    mask = torch.ones((n, prompt_len), dtype=torch.bool, device=scores.device)
    mask[:, :m] = top_mask(without_nan(scores), counts - window, max(width - window, 0))
    # A kept position goes to its rank among the kept ones, others to a column that is cut off.
    column = torch.where(mask, mask.cumsum(dim=1) - 1, width)
    positions = torch.arange(prompt_len, device=scores.device).expand(n, -1)
    indices = torch.full((n, width + 1), -1, dtype=torch.int64, device=scores.device)
    indices.scatter_(1, column, positions)
    return indices[:, :width].contiguous()


def pooled_counts(scores: Tensor, total: int, order: Sequence[int], floor: int = 0) -> Tensor:
    """Entries of each row, where every row keeps its best and the rest of the table competes.

    Args:
        scores: [n, M].
        total: Entries to take over all rows.
        order: Rows in the order in which they take entries equal to the threshold (by head index).
        floor: Best entries that each row keeps in any case, at most M; n times that is at most
            ``total``.

    Returns:
        int64 [n], sums to min(total, n * M).
    """
    n, m = scores.shape
    if total >= n * m:
        return torch.full((n,), m, dtype=torch.int64, device=scores.device)
    if total <= n * floor:
        return torch.full((n,), floor, dtype=torch.int64, device=scores.device)
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        from fairkv_sglang.budgets import selection_cpu

        rank = np.array(order, dtype=np.int64)
        return torch.from_numpy(selection_cpu.pooled_counts(scores.numpy(), total, rank, floor))
    return pooled(scores, total, order, floor)


def pooled(scores: Tensor, total: int, order: Sequence[int], floor: int = 0) -> Tensor:
    """:func:`pooled_counts` of a part of the table in torch, on any device."""
    scores = without_nan(scores)
    if floor:
        rest = scores.sort(dim=1, descending=True).values[:, floor:]
        return floor + pooled(rest, total - len(scores) * floor, order)
    n, m = scores.shape
    threshold = torch.kthvalue(scores.reshape(-1), n * m - total + 1).values
    above = (scores > threshold).sum(dim=1)
    rows = torch.tensor(order, dtype=torch.int64).to(scores.device, non_blocking=True)
    tied = (scores == threshold).sum(dim=1)[rows]
    before = tied.cumsum(0) - tied
    taken = torch.minimum((total - above.sum() - before).clamp(min=0), tied)
    return above.index_add(0, rows, taken)

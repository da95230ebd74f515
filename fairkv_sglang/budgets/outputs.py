# SPDX-License-Identifier: Apache-2.0
"""What a cached token is worth while its request writes: attention of the last tokens, less what
others stand in for.

The window is that of the last output tokens, and what is scored is what a head still holds, prompt
and output alike. Positions are not needed: rows lie in their order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

KERNEL = 7
"""Neighbouring rows over which attention is pooled, as for prompts (SnapKV, arXiv 2404.14469)."""
SIMILAR = 0.5
"""Cosine from which on a key counts as one that another stands in for (R-KV's threshold)."""


def score_held(q: Tensor, k: Tensor, held: Tensor, scale: float, redundancy: float = 0.0) -> Tensor:
    """Scores of all rows that each of E heads holds.

    With W queries of the group, oldest first, that see the rows up to their own:

        a[j, i, t] = softmax over t of (q[j, i] . k[t]) * scale          (float32)
        I[t]       = mean over j of max over t' = t - 3 .. t + 3 of mean over i of a[j, i, t']
        score[t]   = (1 - redundancy) * I[t] - redundancy * R[t]

    The last W rows, whose queries these are, are left out of the pooling. I is that of SnapKV, R is
    R-KV's (arXiv 2505.24133, section 3): softmax over t of the mean over i of the cosine of k[i]
    and k[t], where i = t and, in each row i, the most recent t above ``SIMILAR`` count as 0, so
    that the last of several like ones stays. R-KV gives it the weight 0.9. Keys are taken as they
    are cached, rotated, as in R-KV's own code: what is alike and far apart counts as less alike.

    Args:
        q: [E, W, g, D] queries with RoPE of the last W tokens.
        k: [E, M, D] keys; those of head e are the first ``held[e]`` rows.
        held: int64 [E], at least W.
        scale: Factor of the attention logits.
        redundancy: Weight of R in [0, 1].

    Returns:
        float32 [E, M]; minus infinity behind ``held[e]``.
    """
    heads, window, group, _ = q.shape
    rows = k.shape[1]
    place = torch.arange(rows, device=k.device)
    keys, end = k.float(), held[:, None]
    logits = torch.matmul(q.float().flatten(1, 2), keys.transpose(1, 2)) * scale
    logits = logits.view(heads, window, group, rows)
    seen = end + torch.arange(1 - window, 1, device=k.device)  # [E, W] rows before each query's end
    hidden = place >= seen[:, :, None, None]
    attention = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(dim=1)  # [E, g, M]
    attention = attention.masked_fill((place >= end - window)[:, None], 0.0)
    pooled = max_pool1d(attention, KERNEL, stride=1, padding=KERNEL // 2)
    scores = pooled.mean(dim=1)
    if redundancy:
        scores = (1 - redundancy) * scores - redundancy * redundant(keys, held)
    return scores.masked_fill(place >= end, -torch.inf)


def key_difference(k: Tensor, held: Tensor) -> Tensor:
    """KeyDiff (arXiv 2504.15364) of all rows that each of E heads holds: minus the cosine of a key
    and the mean direction of the head's keys.

    A key's score changes little from one compression to the next, so what stood out stays.

    Args:
        k, held: As :func:`score_held` has them.

    Returns:
        float32 [E, M]; minus infinity behind ``held[e]``.
    """
    inside = torch.arange(k.shape[1], device=k.device) < held[:, None]
    unit = normalize(k.float(), dim=-1).masked_fill(~inside[..., None], 0.0)
    mean = unit.sum(dim=1, keepdim=True) / held[:, None, None]
    cosine = (unit * normalize(mean, dim=-1)).sum(dim=-1)
    return (-cosine).masked_fill(~inside, -torch.inf)


def redundant(k: Tensor, held: Tensor) -> Tensor:
    """R of :func:`score_held`, float32 [E, M]; 0 behind ``held[e]``."""
    rows = k.shape[1]
    place = torch.arange(rows, device=k.device)
    inside = place < held[:, None]
    unit = normalize(k.float(), dim=-1).masked_fill(~inside[..., None], 0.0)
    cosine = torch.matmul(unit, unit.transpose(1, 2))
    cosine.diagonal(dim1=1, dim2=2).zero_()
    last = torch.where(cosine > SIMILAR, place, -1).amax(dim=2, keepdim=True)
    cosine = cosine.masked_fill(place == last, 0.0)
    mean = cosine.sum(dim=1) / held[:, None]
    return mean.masked_fill(~inside, -torch.inf).softmax(-1)

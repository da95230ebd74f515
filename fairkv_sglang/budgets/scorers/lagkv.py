# SPDX-License-Identifier: Apache-2.0
"""LagKV (arXiv 2504.04704): tokens that stand out from the stretch of tokens after theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fairkv_sglang.budgets.prompt_tensors import PromptTensors
from fairkv_sglang.budgets.scorers.base import SCORERS
from fairkv_sglang.budgets.scorers.per_head import PerHead
from fairkv_sglang.registry import option


@SCORERS.register
@dataclass(frozen=True)
class LagKV(PerHead):
    """Rank of a token among those of its partition, from keys and values alone.

    After the sinks the prompt is cut into partitions of ``lag`` tokens. With the least and the
    largest number of each channel d in the *next* partition, for token t and x = k or v:

        r[t, d]  = (x[t, d] - least[d]) / (largest[d] - least[d])
        s_x[t]   = softmax over the partition of the standard deviation over d of r[t, d]
        score[t] = rank of s_k[t] + s_v[t] in the partition (lowest 0) / lag

    So each partition keeps about the same share. The last whole partition has none after it; it
    and what follows score above all, the later the higher, and so do the sinks. A prompt of less
    than two partitions after the sinks keeps sinks and the most recent tokens.
    """

    name: ClassVar[str] = "lagkv"
    summary: ClassVar[str] = "keys and values that stand out from the next tokens'"
    needs_values: ClassVar[bool] = True

    sink: int = option(4, "First tokens of the prompt, always kept.", ge=0)
    lag: int = option(128, "Tokens of a partition.", gt=1)

    def score_head(self, head: PromptTensors) -> Tensor:
        """See the base class."""
        assert head.v is not None  # checked by the base class
        total, sink, lag = len(head.k), self.sink, self.lag
        scores = 1 + torch.arange(total, device=head.k.device).float() / total
        scores[:sink] += 1
        whole = (total - sink) // lag
        if whole >= 2:
            end = sink + whole * lag
            k, v = (x[sink:end].float().view(whole, lag, -1) for x in (head.k, head.v))
            apart = _apart(k) + _apart(v)
            rank = apart.argsort(dim=1, stable=True).argsort(dim=1)
            scores[sink : end - lag] = rank.flatten().float() / lag
        return scores[: total - self.window]


def _apart(x: Tensor) -> Tensor:
    """``[P - 1, lag]`` from ``[P, lag, D]``; a channel that is constant in the next partition says
    nothing and counts as 0, where the formula divides by zero.
    """
    following = x[1:]
    least = following.amin(dim=1, keepdim=True)
    largest = following.amax(dim=1, keepdim=True)
    apart = torch.where(largest > least, (x[:-1] - least) / (largest - least), 0.0)
    return apart.std(dim=2).softmax(dim=1)

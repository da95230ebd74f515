# SPDX-License-Identifier: Apache-2.0
"""H2O (arXiv 2306.14048): attention that a token has got from all queries of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fairkv_sglang.budgets.prompt_tensors import PromptTensors
from fairkv_sglang.budgets.scorers.base import SCORERS
from fairkv_sglang.budgets.scorers.per_head import Observer
from fairkv_sglang.registry import option


@SCORERS.register
@dataclass(frozen=True)
class H2O(Observer):
    """Accumulated attention. For query head j, query i and token t <= i:

        a[j, i, t] = softmax over t <= i of (q[j, i] . k[t]) * scale      (float32)
        score[t]   = mean over j of the sum over i >= t of a[j, i, t]

    ``accumulation`` mean divides by the number of queries that see the token, N - t, which takes
    away the advantage of early tokens (kvpress's observed attention). The paper evicts while it
    reads; here the whole prompt is scored once.

    Attention is computed a second time for it: scoring costs as much as the prompt's attention.
    """

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "attention from all tokens of the prompt"

    accumulation: Literal["sum", "mean"] = option(
        "sum", "Whether the attention of all queries is added up or averaged."
    )

    @property
    def block(self) -> int:
        """Queries whose logits are in memory at a time."""
        return 64

    def take_in(self, seen: Tensor | None, block: PromptTensors, first: int) -> Tensor:
        """Adds up to float32 ``[end]``, the mean over the group."""
        assert block.q is not None
        q, k = block.q.float().transpose(0, 1), block.k.contiguous().float()
        logits = q @ k.T * block.scale  # [g, T, end]
        hidden = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).triu(first + 1)
        got = logits.masked_fill_(hidden, -torch.inf).softmax(dim=2).sum(dim=1).mean(dim=0)
        if seen is not None:
            got[:first] += seen
        return got

    def score_head(self, head: PromptTensors) -> Tensor:
        """See the base class."""
        total = len(head.k)
        scores: Tensor = head.seen
        if self.accumulation == "mean":
            scores = scores / torch.arange(total, 0, -1, device=scores.device)
        return scores[: total - self.window]

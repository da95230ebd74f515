# SPDX-License-Identifier: Apache-2.0
"""Expected Attention (arXiv 2510.00636): attention that queries still to come are likely to pay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fairkv_sglang.budgets.prompt_tensors import PromptTensors
from fairkv_sglang.budgets.scorers.base import SCORERS
from fairkv_sglang.budgets.scorers.per_head import ALWAYS, Observer
from fairkv_sglang.registry import option


@SCORERS.register
@dataclass(frozen=True)
class ExpectedAttention(Observer):
    """Queries before rotation are taken for normally distributed, with the prompt's own mean m and
    covariance C (without the sinks' queries); R is the mean rotation of the next ``future``
    positions. For query head j, with keys as they lie in the cache:

        a[j, t]  = softmax over t of (R m_j) . k[t] * scale + k[t] R C_j R' k[t]' * scale^2 / 2
        score[t] = (mean over j of a[j, t] + epsilon) * |v[t]|

    Sinks are left out of the softmax and kept. Where the model's positions end, R is taken over
    those that are left.
    """

    name: ClassVar[str] = "expected_attention"
    summary: ClassVar[str] = "attention expected from queries to come"
    needs_values: ClassVar[bool] = True
    needs_rope: ClassVar[bool] = True

    sink: int = option(4, "First tokens of the prompt, always kept.", ge=0)
    future: int = option(512, "Positions after the prompt whose queries are expected.", gt=0)
    epsilon: float = option(0.0, "Added to the expected attention of every token.", ge=0)

    @property
    def block(self) -> int:
        """See the base class; any number does."""
        return 128

    @property
    def first_query(self) -> int:
        """See the base class."""
        return self.sink

    def take_in(self, seen: Any, block: PromptTensors, first: int) -> tuple[int, Tensor, Tensor]:
        """Number, sum ``[g, D]`` and sum of outer products ``[g, D, D]`` of the queries, float64:
        the covariance is a difference.
        """
        assert block.q is not None and block.rope is not None
        q = block.rope.undo(block.q, first).double().transpose(0, 1)  # [g, T, D]
        sums = (q.shape[1], q.sum(dim=1), q.transpose(1, 2) @ q)
        return sums if seen is None else (seen[0] + sums[0], seen[1] + sums[1], seen[2] + sums[2])

    def score_head(self, head: PromptTensors) -> Tensor:
        """See the base class."""
        assert head.v is not None and head.rope is not None
        total, scored = len(head.k), len(head.k) - self.window
        sinks = torch.full((min(self.sink, scored),), ALWAYS, device=head.k.device)
        if scored <= self.sink:
            return sinks
        number, added, outer = head.seen
        mean = added / number
        spread = outer / number - mean[:, :, None] * mean[:, None, :]
        turned = head.rope.mean(total, total + self.future)
        mean = head.rope.turn(mean.float(), *turned)
        for _ in range(2):  # both sides; the matrix is symmetric
            spread = head.rope.turn(spread.float(), *turned).transpose(1, 2)
        k = head.k[self.sink :].float()
        logits = mean @ k.T * head.scale
        for row, of_head in zip(logits, spread, strict=True):  # one [N, D] at a time
            row += ((k @ of_head) * k).sum(dim=1) * (head.scale**2 / 2)
        weight = (logits.softmax(dim=1).mean(dim=0) + self.epsilon) * head.v[self.sink :].norm(
            dim=1, dtype=torch.float32
        )
        return torch.cat([sinks, weight[: -self.window]])

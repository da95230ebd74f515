# SPDX-License-Identifier: Apache-2.0
"""Compactor (arXiv 2507.08143): leverage of keys, blended with attention that is not causal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from fairkv_sglang.budgets.prompt_tensors import PromptTensors
from fairkv_sglang.budgets.scorers.base import SCORERS
from fairkv_sglang.budgets.scorers.leverage import leverage, unrotated
from fairkv_sglang.budgets.scorers.per_head import ALWAYS, Observer
from fairkv_sglang.registry import option


@SCORERS.register
@dataclass(frozen=True)
class Compactor(Observer):
    """Of the tokens between the sinks and the window, cut into blocks of ``attention_block``:

        a[j, t]  = sum over queries i of t's block of softmax over the block of q[j, i] . k[t]
        c[t]     = mean over query heads j of a[j, t], times |v[t]|
        score[t] = blending * z(leverage)[t] + z(mean of c over t - 1, t, t + 1)

    z subtracts the mean over the head's tokens and divides by their standard deviation. Every query
    attends to its whole block, later tokens included, with logits that are not scaled, as in
    kvpress, whose press is by the paper's author. Two things are not as there: z is taken head by
    head instead of over all heads of a layer, so that a head's score is its own; and a last block
    that is not full is not padded with queries and keys of zeros.
    """

    name: ClassVar[str] = "compactor"
    summary: ClassVar[str] = "leverage of keys, and attention inside blocks of the prompt"
    needs_values: ClassVar[bool] = True
    needs_rope: ClassVar[bool] = True
    takes_window: ClassVar[bool] = False

    sink: int = option(8, "First tokens of the prompt, always kept.", ge=0)
    sketch: int = option(48, "Columns of the random sketch of the keys.", gt=0)
    attention_block: int = option(256, "Tokens among which attention is looked at.", gt=0)
    blending: float = option(0.35, "Weight of leverage beside attention.", ge=0)

    @property
    def averages_group(self) -> bool:
        """No: z comes after the mean over the group."""
        return False

    @property
    def block(self) -> int:
        """See the base class."""
        return self.attention_block

    @property
    def first_query(self) -> int:
        """See the base class."""
        return self.sink

    def take_in(self, seen: list[Tensor] | None, block: PromptTensors, first: int) -> list[Tensor]:
        """Appends what each token of the block gets, the mean over the group."""
        assert block.q is not None
        q, k = block.q.float().transpose(0, 1), block.k[first:].contiguous().float()
        got = (q @ k.T).softmax(dim=2).sum(dim=1).mean(dim=0)
        return [*(seen or []), got]

    def score_head(self, head: PromptTensors) -> Tensor:
        """See the base class."""
        assert head.v is not None
        scored = len(head.k) - self.window
        sinks = torch.full((min(self.sink, scored),), ALWAYS, device=head.k.device)
        if scored <= self.sink:
            return sinks
        some: Any = slice(self.sink, scored)
        attention = torch.cat(head.seen) * head.v[some].float().norm(dim=1)
        attention = avg_pool1d(attention[None], kernel_size=3, padding=1, stride=1)[0]
        scores = self.blending * _z(leverage(unrotated(head)[some], self.sketch)) + _z(attention)
        return torch.cat([sinks, scores])


def _z(x: Tensor) -> Tensor:
    spread = x.std() if len(x) > 1 else x.new_zeros(())
    return (x - x.mean()) / spread.clamp(min=1e-6)

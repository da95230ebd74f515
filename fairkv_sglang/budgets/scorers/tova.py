# SPDX-License-Identifier: Apache-2.0
"""TOVA (arXiv 2401.06104): attention that the last token pays, averaged over all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fairkv_sglang.budgets.prompt_tensors import PromptTensors
from fairkv_sglang.budgets.scorers.base import SCORERS
from fairkv_sglang.budgets.scorers.per_head import PerHead


@SCORERS.register
@dataclass(frozen=True)
class TOVA(PerHead):
    """For query head j of a layer and token t:

        a[j, t]  = softmax over t of (q[j, last] . k[t]) * scale      (float32)
        score[t] = mean over all j of a[j, t]

    Every head of a layer keeps the same tokens, so the heads' scores are exchanged whatever the
    scope. The paper evicts one token at a time while it generates; here the prompt is cut once.
    """

    name: ClassVar[str] = "tova"
    summary: ClassVar[str] = "attention from the last token, mean of all heads of a layer"
    needs_queries: ClassVar[bool] = True
    spans_heads: ClassVar[bool] = True

    def score_head(self, head: PromptTensors) -> Tensor:
        """Mean over the query heads of the group."""
        assert head.q is not None  # checked by the base class
        logits = head.q[-1].float() @ head.k.float().T * head.scale
        return logits.softmax(dim=1).mean(dim=0)[: -self.window]

    def combine(self, scores: Tensor) -> Tensor:
        """Mean over the heads; groups are equally large."""
        return scores.mean(dim=0, keepdim=True).expand(len(scores), -1).contiguous()

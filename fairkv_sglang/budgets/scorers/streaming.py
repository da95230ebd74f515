# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM (arXiv 2309.17453): the first tokens and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fairkv_sglang.budgets.scorers.base import SCORERS, Scorer
from fairkv_sglang.registry import option

if TYPE_CHECKING:
    from fairkv_sglang.kernels.prompts import PromptBatch


@SCORERS.register
@dataclass(frozen=True)
class Streaming(Scorer):
    """Sinks first, then the later the better; the same for every head.

    A head with budget B keeps min(sink, B - window) first tokens and the rest at the end. Keys keep
    their original positions; the paper's re-rotation of keys is left out (budgets only, not
    endless generation).
    """

    name: ClassVar[str] = "streaming"
    summary: ClassVar[str] = "the first and the most recent tokens"
    batched: ClassVar[bool] = True

    sink: int = option(4, "First tokens of the prompt, always kept.", ge=0)

    def score(self, q: Tensor | None, k: Tensor, *, scale: float) -> Tensor:
        total, n, _ = k.shape
        scored = max(total - self.window, 0)
        # Whole numbers below 2**24: exact in float32.
        scores = torch.arange(scored, dtype=torch.float32, device=k.device)
        sinks = min(self.sink, scored)
        scores[:sinks] = torch.arange(scored + sinks, scored, -1, device=k.device).float()
        return scores.expand(n, -1).contiguous()

    def score_all(
        self, q: Tensor | None, k_pool: Tensor, prompts: PromptBatch, *, scale: float
    ) -> Tensor:
        """See the base class; the keys are not looked at, so none are gathered."""
        found = [
            self.score(None, k_pool[:1].expand(n, -1, -1), scale=scale)
            for n, scored in zip(prompts.lengths, prompts.scored, strict=True)
            if scored
        ]
        return torch.cat(found, dim=1)

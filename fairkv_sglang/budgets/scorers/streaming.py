# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM (arXiv 2309.17453): the first tokens and the most recent ones."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fairkv_sglang.budgets.scorers.base import SCORERS, Scorer


@SCORERS.register
class Streaming(Scorer):
    """Sinks first, then the later the better; the same for every head.

    A head with budget B keeps min(sink, B - recent) first tokens and the rest at the end. Keys keep
    their original positions; the paper's re-rotation of keys is left out (budgets only, not
    endless generation).

    Args:
        sink: First tokens that rank above all others.
        recent: Last tokens that are kept whatever the budget; more recent ones fill the budget.
    """

    name: ClassVar[str] = "streaming"
    needs_queries: ClassVar[bool] = False

    def __init__(self, sink: int = 4, recent: int = 32) -> None:
        if sink < 0 or recent < 1:
            raise ValueError(
                f"scorer 'streaming': needs sink >= 0 and recent >= 1, not {sink} and {recent}"
            )
        self.sink, self.window = sink, recent

    def score(self, q: Tensor | None, k: Tensor, *, scale: float) -> Tensor:
        total, n, _ = k.shape
        scored = max(total - self.window, 0)
        # Whole numbers below 2**24: exact in float32.
        scores = torch.arange(scored, dtype=torch.float32, device=k.device)
        sinks = min(self.sink, scored)
        scores[:sinks] = torch.arange(scored + sinks, scored, -1, device=k.device).float()
        return scores.expand(n, -1).contiguous()

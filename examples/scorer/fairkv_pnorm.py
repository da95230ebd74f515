# SPDX-License-Identifier: Apache-2.0
"""Knorm (arXiv 2406.11430) with any p: keys of small norm are those that get attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fairkv_sglang.budgets import Scorer
from fairkv_sglang.registry import option


@dataclass(frozen=True)
class PNorm(Scorer):
    """score[t] = -(sum over d of |k[t, d]| ** p) ** (1 / p), for each KV head by itself.

    Asks for no queries. The paper takes p = 2.
    """

    name: ClassVar[str] = "pnorm"
    summary: ClassVar[str] = "keys of small p-norm"

    norm_power: float = option(2.0, "The p of the norm of a key.", gt=0)

    def score(self, q: Tensor | None, k: Tensor, *, scale: float) -> Tensor:
        """See the base class."""
        scored = k[: max(len(k) - self.window, 0)].float()  # [N - W, n, D]
        return -torch.linalg.vector_norm(scored, ord=self.norm_power, dim=-1).T.contiguous()

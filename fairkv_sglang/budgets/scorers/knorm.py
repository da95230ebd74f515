# SPDX-License-Identifier: Apache-2.0
"""Knorm (arXiv 2406.11430): keys of small norm are those that get attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fairkv_sglang.budgets.prompt_tensors import PromptTensors
from fairkv_sglang.budgets.scorers.base import SCORERS
from fairkv_sglang.budgets.scorers.per_head import PerHead


@SCORERS.register
@dataclass(frozen=True)
class Knorm(PerHead):
    """score[t] = -|k[t]|, the Euclidean norm in float32. Asks for no queries.

    The paper leaves the first two layers whole; here all layers are compressed.
    """

    name: ClassVar[str] = "knorm"
    summary: ClassVar[str] = "keys of small norm"

    def score_head(self, head: PromptTensors) -> Tensor:
        """See the base class."""
        norms: Tensor = torch.linalg.vector_norm(head.k[: -self.window].float(), dim=1)
        return -norms

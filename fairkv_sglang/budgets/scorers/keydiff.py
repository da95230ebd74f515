# SPDX-License-Identifier: Apache-2.0
"""KeyDiff (arXiv 2504.15364): keys that are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from fairkv_sglang.budgets.prompt_tensors import PromptTensors
from fairkv_sglang.budgets.scorers.base import SCORERS
from fairkv_sglang.budgets.scorers.per_head import PerHead


@SCORERS.register
@dataclass(frozen=True)
class KeyDiff(PerHead):
    """Least like the mean direction of all keys of the prompt, the window's included.

        anchor   = mean over t of k[t] / |k[t]|
        score[t] = -cos(k[t], anchor)      (float32)

    Keys as they lie in the cache, rotated. Asks for no queries. The paper evicts block by block
    while it reads; here the whole prompt is scored once.
    """

    name: ClassVar[str] = "keydiff"
    summary: ClassVar[str] = "keys unlike the others"

    def score_head(self, head: PromptTensors) -> Tensor:
        """See the base class."""
        k = head.k.float()
        anchor = normalize(k, dim=1).mean(dim=0, keepdim=True)
        return -cosine_similarity(k[: -self.window], anchor, dim=1)

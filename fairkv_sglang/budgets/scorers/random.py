# SPDX-License-Identifier: Apache-2.0
"""Random tokens: the control that any method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from fairkv_sglang.budgets.prompt_tensors import PromptTensors
from fairkv_sglang.budgets.scorers.base import SCORERS
from fairkv_sglang.budgets.scorers.per_head import PerHead
from fairkv_sglang.registry import option

_MASK = 0xFFFFFFFF
T = TypeVar("T", int, Tensor)


@SCORERS.register
@dataclass(frozen=True)
class Random(PerHead):
    """A number in [0, 1) from a hash of seed, layer, head and position; the keys are not looked at.

    So a prompt keeps the same tokens each time, on any rank and device. The hash is two rounds of
    multiplying by 0x45D9F3B and folding the upper half onto the lower one, on 32 bits.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "random tokens, as a control"

    seed: int = option(0, "Chooses the random tokens.", ge=0, le=_MASK)

    def score_head(self, head: PromptTensors) -> Tensor:
        """See the base class."""
        stream = _mixed(_mixed(self.seed) ^ (head.layer << 16 | head.heads[0]))
        position = torch.arange(len(head.k) - self.window, device=head.k.device)
        return (_mixed(position ^ stream) >> 8).float() / 2**24  # 24 bits are exact in float32


def _mixed(x: T) -> T:
    """A hash of 32-bit numbers; no product overflows 63 bits."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & _MASK
    return (x >> 16) ^ x

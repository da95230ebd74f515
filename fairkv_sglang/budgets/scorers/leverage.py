# SPDX-License-Identifier: Apache-2.0
"""Leverage scores of keys (arXiv 2507.08143, section 3): tokens that no others stand in for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from fairkv_sglang.budgets.prompt_tensors import PromptTensors
from fairkv_sglang.budgets.scorers.base import SCORERS
from fairkv_sglang.budgets.scorers.per_head import PerHead
from fairkv_sglang.registry import option

RIDGE = 1e-2
"""Added to the diagonal of the Gram matrix, as in kvpress, whose press is by the paper's author."""


@SCORERS.register
@dataclass(frozen=True)
class Leverage(PerHead):
    """How much of a key lies outside of what the other keys span, by a random sketch.

        X        = (K - mean over t of K) S      K: keys before their rotation, S: [D, sketch]
        score[t] = x[t] (X'X + 0.01 I)^-1 x[t]'

    S holds numbers of the normal distribution of variance 1 / sketch, the same for every head,
    layer and prompt. The paper orthogonalises X; the Gram matrix gives the same scores. Asks for no
    queries.
    """

    name: ClassVar[str] = "leverage"
    summary: ClassVar[str] = "keys that no others stand in for"
    needs_rope: ClassVar[bool] = True

    sketch: int = option(48, "Columns of the random sketch of the keys.", gt=0)

    def score_head(self, head: PromptTensors) -> Tensor:
        """See the base class."""
        return leverage(unrotated(head), self.sketch)[: -self.window]


def unrotated(head: PromptTensors) -> Tensor:
    """Keys of a head before their rotation, float32 ``[N, D]``."""
    assert head.rope is not None  # checked by PerHead
    return head.rope.undo(head.k)


def leverage(keys: Tensor, sketch: int) -> Tensor:
    """Approximate leverage scores, float32 ``[T]``, of float32 ``[T, D]``."""
    x = (keys - keys.mean(dim=0)) @ sketching(keys.shape[1], sketch, keys.device)
    # In float64: in float32 the Gram matrix of many or large keys is not positive any more.
    wide = x.double()
    gram = wide.T @ wide
    gram.diagonal().add_(RIDGE)
    factor = torch.linalg.cholesky_ex(gram).L
    identity = torch.eye(sketch, dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    scores: Tensor = (wide @ inverse.T).square().sum(dim=1).float()
    return scores


@lru_cache(16)
def sketching(dim: int, sketch: int, device: torch.device) -> Tensor:
    """S, float32 ``[dim, sketch]``; made on the CPU, so that it is the same on every device."""
    source = torch.Generator().manual_seed(0)
    return (torch.randn(dim, sketch, generator=source) / math.sqrt(sketch)).to(device)

# SPDX-License-Identifier: Apache-2.0
"""SnapKV (arXiv 2404.14469): attention that the last queries pay to each token, pooled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from fairkv_sglang.budgets.scorers.base import SCORERS, Scorer
from fairkv_sglang.registry import option

if TYPE_CHECKING:
    from fairkv_sglang.kernels.prompts import PromptBatch


@SCORERS.register
@dataclass(frozen=True)
class SnapKV(Scorer):
    """Mean attention of the observation window, pooled over neighbours, averaged over the group.

    For query head j of the KV head, window rows i = 1..W and token t:

        a[j, i, t] = softmax over t of (q[j, i] . k[t]) * scale, causal      (float32)
        m[j, t]    = mean over i of a[j, i, t]
        s[j, t]    = pool of m[j, t'] over t' = t - kernel_size // 2 .. t + kernel_size // 2
        score[t]   = mean over j of s[j, t]      (or the largest)

    Pooling runs over the tokens before the window only. Outside of them max pooling sees nothing
    and average pooling sees zeros (its divisor is always ``kernel_size``), as in the authors' code.
    The paper sums over the window; the mean, used by Ada-KV, orders tokens the same.

    The GQA group is reduced before any top-k: a head keeps one set of tokens for its whole group.

    A fused kernel computes it on each kind of device; the tests have it in plain torch.
    """

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "attention from the last tokens of the prompt"
    needs_queries: ClassVar[bool] = True
    batched: ClassVar[bool] = True

    kernel_size: int = option(
        7, "Width of the pooling over neighbouring tokens, odd; 1 = none.", gt=0
    )
    pooling: Literal["max", "avg"] = option("max", "Kind of the pooling.")
    group: Literal["mean", "max"] = option(
        "mean", "What becomes of the scores of the query heads that share a KV head."
    )

    def __post_init__(self) -> None:
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size: {self.kernel_size} is even; pooling is centred on a token, so give "
                f"an odd number, e.g. {self.kernel_size + 1}"
            )

    @property
    def averages_group(self) -> bool:
        """See the base class."""
        return self.group == "mean"

    def score(self, q: Tensor | None, k: Tensor, *, scale: float) -> Tensor:
        if q is None or q.shape[0] == 0:
            raise ValueError("scorer 'snapkv' needs the queries of the last tokens of the prompt")
        total, n, width = k.shape
        if q.dim() != 4 or q.shape[1] != n or q.shape[3] != width:
            raise ValueError(f"queries {list(q.shape)} do not fit keys {list(k.shape)}")
        q = q[-self.window :]
        if len(q) < min(self.window, total):
            raise ValueError(f"scorer 'snapkv' needs {self.window} queries, not {len(q)}")
        # Here, not above: flags are made from this module in processes that score nothing.
        from fairkv_sglang.kernels import kernels_for

        kernels = kernels_for(q.device.type)
        return self._over_group(
            q, lambda some: kernels.snapkv_score(some, k, scale, self.kernel_size, self.pooling)
        )

    def score_all(
        self, q: Tensor | None, k_pool: Tensor, prompts: PromptBatch, *, scale: float
    ) -> Tensor:
        """See the base class; keys are read where they lie."""
        from fairkv_sglang.kernels import kernels_for

        of_prompts = kernels_for("cuda").prompts
        if q is None or of_prompts is None:
            raise ValueError("scorer 'snapkv' needs the queries of the last tokens of the prompt")
        return self._over_group(
            q,
            lambda some: of_prompts.snapkv_scores(
                some, k_pool, prompts, scale, self.kernel_size, self.pooling
            ),
        )

    def _over_group(self, q: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        """Kernels average over the query heads (dimension -2) that they are given."""
        if self.group == "mean":
            return score(q)
        found = [score(q[..., j : j + 1, :].contiguous()) for j in range(q.shape[-2])]
        return torch.stack(found).amax(dim=0)

# SPDX-License-Identifier: Apache-2.0
"""SnapKV (arXiv 2404.14469): attention that the last queries pay to each token, pooled."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fairkv_sglang import kernels
from fairkv_sglang.budgets.scorers.base import SCORERS, Scorer


@SCORERS.register
class SnapKV(Scorer):
    """Mean attention of the observation window, pooled over neighbours, averaged over the group.

    For query head j of the KV head, window rows i = 1..W and token t:

        a[j, i, t] = softmax over t of (q[j, i] . k[t]) * scale, causal      (float32)
        m[j, t]    = mean over i of a[j, i, t]
        s[j, t]    = pool of m[j, t'] over t' = t - kernel // 2 .. t + kernel // 2
        score[t]   = mean over j of s[j, t]

    Pooling runs over the tokens before the window only. Outside of them max pooling sees nothing
    and average pooling sees zeros (its divisor is always ``kernel``), as in the authors' code. The
    paper sums over the window; the mean, used by Ada-KV, orders tokens the same.

    The GQA group is reduced before any top-k: a head keeps one set of tokens for its whole group.

    A fused kernel computes it on each kind of device; ``kernels.reference`` has it in plain torch.

    Args:
        window: W, also the tokens at the end of the prompt that are always kept.
        kernel: Odd width of the pool; 1 = none.
        pooling: "max" or "avg".
    """

    name: ClassVar[str] = "snapkv"
    needs_queries: ClassVar[bool] = True

    def __init__(self, window: int = 32, kernel: int = 7, pooling: str = "max") -> None:
        if window < 1:
            raise ValueError(f"scorer 'snapkv': window must be at least 1, not {window}")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"scorer 'snapkv': kernel must be odd and positive, not {kernel}")
        if pooling not in ("max", "avg"):
            raise ValueError(f"scorer 'snapkv': pooling must be max or avg, not {pooling!r}")
        self.window, self.kernel, self.pooling = window, kernel, pooling

    def score(self, q: Tensor | None, k: Tensor, *, scale: float) -> Tensor:
        if q is None or q.shape[0] == 0:
            raise ValueError("scorer 'snapkv' needs the queries of the last tokens of the prompt")
        total, n, width = k.shape
        if q.dim() != 4 or q.shape[1] != n or q.shape[3] != width:
            raise ValueError(f"queries {list(q.shape)} do not fit keys {list(k.shape)}")
        q = q[-self.window :]
        if len(q) < min(self.window, total):
            raise ValueError(f"scorer 'snapkv' needs {self.window} queries, not {len(q)}")
        return kernels.snapkv_score(q, k, scale, self.kernel, self.pooling)

# SPDX-License-Identifier: Apache-2.0
"""SnapKV (arXiv 2404.14469): attention that the last queries pay to each token, pooled."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fairkv_sglang.budgets.scorers.base import SCORERS, Scorer

# Two float32 buffers of this size are alive at a time: logits and weights of some query heads.
BUFFER_BYTES = 32 << 20
KEY_CHUNK = 32768


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

    Numbers of one head are computed from contiguous copies of that head's rows by products whose
    shapes depend on its own sizes only. So the same library with the same number of threads gives
    the same bits, whichever other heads are in the call.

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
        scored = max(total - self.window, 0)
        scores = torch.empty((n, scored), dtype=torch.float32, device=k.device)
        if scored:
            q = q[-self.window :]
            for head in range(n):
                scores[head] = self._score_head(q[:, head], k[:, head], scale)
        return scores

    def _score_head(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """[N - window] from q [W', g, D] and k [N, D]."""
        rows, group, width = q.shape
        total = k.shape[0]
        scored = total - self.window
        at_once = max(1, min(group, BUFFER_BYTES // (4 * rows * total)))
        # Row i stands at position total - rows + i and does not see what follows it.
        hidden = torch.ones((rows, rows), dtype=torch.bool, device=k.device).triu_(1)
        result = torch.zeros(scored, dtype=torch.float32, device=k.device)
        for first in range(0, group, at_once):
            queries = q[:, first : first + at_once].transpose(0, 1).reshape(-1, width).float()
            logits = torch.empty((len(queries), total), dtype=torch.float32, device=k.device)
            for start in range(0, total, KEY_CHUNK):
                keys = k[start : start + KEY_CHUNK].float().contiguous()
                logits[:, start : start + KEY_CHUNK] = queries @ keys.T
            logits = logits.mul_(scale).view(-1, rows, total)
            logits[:, :, total - rows :].masked_fill_(hidden, -torch.inf)
            attention = torch.softmax(logits, dim=-1)[:, :, :scored].mean(dim=1)
            result += self._pool(attention).sum(dim=0)
        return result / group

    def _pool(self, attention: Tensor) -> Tensor:
        """Pools [g, M] along its last axis; same shape."""
        if self.kernel == 1:
            return attention
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        return pool(attention[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]

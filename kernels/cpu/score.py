# SPDX-License-Identifier: Apache-2.0
"""SnapKV's scores (arXiv 2404.14469) on the CPU: products by BLAS, the rest compiled by numba.

Softmax, mean over the window, pooling and sum over the group read each logit twice and write one
number for each token; in torch they are a dozen passes over the whole table.
"""

from __future__ import annotations

import numba as nb
import numpy as np
import torch
from numba.core import types

from .attention import FLAGS, LOG2_E, exp2

BUFFER_BYTES = 32 << 20
"""Logits of some query heads that are alive at a time."""

F32_1D = types.Array(types.float32, 1, "C")
F32_3D = types.Array(types.float32, 3, "C")


@nb.njit(  # type: ignore[untyped-decorator]
    types.void(F32_3D, types.float32, types.int64, types.boolean, F32_1D, F32_1D),
    cache=True,
    nogil=True,
    fastmath=FLAGS,
    error_model="numpy",
)
def _add_pooled(logits, scale, kernel, largest, padded, out):  # type: ignore[no-untyped-def]
    """Add the pooled mean attention of each query head to `out`.

    logits: [g, W, N] before scaling (to base 2), overwritten. padded: scratch of N - W numbers with
    kernel // 2 zeros at both ends; as attention is not negative, zeros do not change a maximum.
    """
    group, rows, total = logits.shape
    scored, half = total - rows, kernel // 2
    for j in range(group):
        padded[:] = 0
        for i in range(rows):
            row = logits[j, i]
            seen = scored + i + 1  # row i stands at position scored + i
            top = row[0]
            for t in range(1, seen):
                top = max(top, row[t])
            weight = np.float32(0)
            for t in range(seen):
                row[t] = exp2((row[t] - top) * scale)
                weight += row[t]
            weight = np.float32(1) / (weight * np.float32(rows))
            for t in range(scored):
                padded[half + t] += row[t] * weight
        if largest:
            pooled = logits[j, 0]  # no longer needed
            for t in range(scored):
                pooled[t] = padded[t]
            for shift in range(1, kernel):
                for t in range(scored):
                    pooled[t] = max(pooled[t], padded[t + shift])
            for t in range(scored):
                out[t] += pooled[t]
        else:
            for shift in range(kernel):
                for t in range(scored):
                    out[t] += padded[t + shift] / np.float32(kernel)


def snapkv_score(
    q: torch.Tensor, k: torch.Tensor, scale: float, kernel: int, pooling: str
) -> torch.Tensor:
    """`Kernels.snapkv_score` on CPU tensors.

    Each head's numbers come from products whose shapes depend on its own sizes only, over
    contiguous copies of its own rows: the same bits whichever other heads are in the call.
    """
    rows, n, group, dim = q.shape
    total = k.shape[0]
    scored = max(total - rows, 0)
    scores = np.zeros((n, scored), dtype=np.float32)
    if scored:
        at_once = max(1, min(group, BUFFER_BYTES // (4 * rows * total)))
        buffer = torch.empty((at_once, rows, total), dtype=torch.float32)
        padded = np.empty(scored + kernel - 1, dtype=np.float32)
        queries = q.permute(1, 2, 0, 3).float().contiguous()
        for head in range(n):
            keys = k[:, head].float().contiguous().T
            for first in range(0, group, at_once):
                some = queries[head, first : first + at_once]
                logits = buffer[: len(some)]
                torch.mm(some.view(-1, dim), keys, out=logits.view(-1, total))
                _add_pooled(
                    logits.numpy(), scale * LOG2_E, kernel, pooling == "max", padded, scores[head]
                )
        scores /= group
    return torch.from_numpy(scores)

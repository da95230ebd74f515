# SPDX-License-Identifier: Apache-2.0
"""SnapKV's scores on the CPU against the torch reference."""

from __future__ import annotations

import pytest
import torch

from fairkv_sglang.kernels.cpu import score
from fairkv_tests import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize(
    ("window", "total", "n", "group", "dim", "kernel"),
    [
        (32, 700, 4, 2, 32, 7),
        (8, 9, 1, 1, 16, 5),  # one token before the window
        (1, 400, 2, 7, 64, 1),
        (16, 333, 3, 4, 128, 33),
    ],
)
def test_score_is_the_reference(dtype, pooling, window, total, n, group, dim, kernel, monkeypatch):
    source = torch.Generator().manual_seed(total)
    q = torch.randn(window, n, group, dim, generator=source).to(dtype)
    k = torch.randn(total, 2 * n, dim, generator=source).to(dtype)[:, ::2]  # a strided view
    scores = score.snapkv_score(q, k, 0.3, kernel, pooling)
    assert scores.shape == (n, total - window)
    wanted = reference.snapkv_score(q, k, 0.3, kernel, pooling)
    torch.testing.assert_close(scores, wanted, rtol=2e-5, atol=1e-9)
    # In bounded memory, and whichever other heads are in the call: the same bits.
    for head in range(n):
        alone = score.snapkv_score(
            q[:, head : head + 1], k[:, head : head + 1], 0.3, kernel, pooling
        )
        assert torch.equal(alone[0], scores[head])
    monkeypatch.setattr(score, "BUFFER_BYTES", 1)
    tight = score.snapkv_score(q, k, 0.3, kernel, pooling)
    torch.testing.assert_close(tight, scores, rtol=2e-5, atol=1e-9)


def test_large_logits_and_nothing_to_score():
    q, k = torch.full((4, 1, 2, 16), 80.0), torch.full((40, 1, 16), 80.0)
    k[7] *= 2
    scores = score.snapkv_score(q, k, 1.0, 1, "max")
    assert scores.argmax() == 7 and scores[0, 7] == pytest.approx(1.0)
    assert torch.isfinite(scores).all()
    assert score.snapkv_score(q, k[:4], 1.0, 3, "avg").shape == (1, 0)

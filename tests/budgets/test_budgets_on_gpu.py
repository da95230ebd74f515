# SPDX-License-Identifier: Apache-2.0
"""The same kept tokens on a GPU; these cases exist only where torch sees one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fairkv_sglang.budgets import SCOPES, BudgetSpec, make_scorer
from fairkv_sglang.profiles import HeadProfile
from fairkv_tests.kept_tokens import select

if torch.cuda.is_available():

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", list(SCOPES))
    @pytest.mark.parametrize("total", [100, 5000])
    def test_selection_on_gpu_equals_cpu(name, total):
        profile = HeadProfile(None, np.random.default_rng(0).random((1, 8)))
        scope = SCOPES[name](BudgetSpec(ratio=0.4), 1, 8, 32, profile)
        source = torch.Generator().manual_seed(0)
        scores = torch.randint(0, 50, (8, total - 32), generator=source).float()
        wanted = select(scope, 0, range(8), scores, total)
        kept = select(scope, 0, range(8), scores.cuda(), total)
        assert kept.indices.is_cuda
        assert torch.equal(kept.counts.cpu(), wanted.counts)
        assert torch.equal(kept.indices.cpu(), wanted.indices)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_snapkv_on_gpu(dtype):
        """Close to the CPU's scores, and the same bits whichever heads are in the call."""
        source = torch.Generator().manual_seed(0)
        q = torch.randn(32, 8, 4, 128, generator=source).to(dtype)
        k = torch.randn(3000, 8, 128, generator=source).to(dtype)
        scorer = make_scorer("snapkv")
        wanted = scorer.score(q, k, scale=0.05)
        scores = scorer.score(q.cuda(), k.cuda(), scale=0.05)
        torch.testing.assert_close(scores.cpu(), wanted, rtol=1e-4, atol=1e-7)
        for first in range(0, 8, 2):
            part = slice(first, first + 2)
            alone = scorer.score(q[:, part].cuda(), k[:, part].cuda(), scale=0.05)
            assert torch.equal(alone, scores[part])

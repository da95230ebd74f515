# SPDX-License-Identifier: Apache-2.0
"""The scorer of examples/scorer against its formula."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

from fairkv_sglang.budgets import SCORERS, BudgetSpec, make_scope, pick

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "scorer" / "fairkv_pnorm.py"


def test_kept_tokens_are_those_of_the_smallest_keys() -> None:
    spec = importlib.util.spec_from_file_location("fairkv_pnorm", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fairkv_pnorm"] = module  # where dataclass looks its annotations up
    spec.loader.exec_module(module)
    assert "pnorm" not in SCORERS  # read here, not installed
    scorer = module.PNorm(window=5, norm_power=3.0)
    k = torch.randn(60, 4, 8, generator=torch.Generator().manual_seed(0))
    scores = scorer.score(None, k, scale=1.0)
    wanted = -((k[:55].double().abs() ** 3).sum(dim=2) ** (1 / 3))
    assert scores.shape == (4, 55) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, wanted.T.float(), rtol=1e-5, atol=1e-6)
    scope = make_scope("uniform", BudgetSpec(tokens=20), 1, 4, scorer)
    kept = pick(scores, scope.counts(0, range(4), scores, 60), 60)
    for head in range(4):
        smallest = np.argsort(-wanted[:, head].numpy(), kind="stable")[:15]
        assert kept.indices[head].tolist() == [*sorted(smallest.tolist()), *range(55, 60)]
    assert scorer.score(None, k[:3], scale=1.0).shape == (4, 0)

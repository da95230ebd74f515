# SPDX-License-Identifier: Apache-2.0
"""The simulation of admission: what the server does leaves less idle than what it did."""

from __future__ import annotations

import numpy as np
import pytest

from fairkv_sglang.bench import admission
from fairkv_sglang.placement.requests import Requests


def test_copies_and_outputs_do_not_leave_pages_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks, a head on most of them copied, pages for eight requests."""
    monkeypatch.setattr(admission, "WARM_UP", 300)
    rng = np.random.default_rng(3)
    heads = np.exp(rng.normal(0, 1, (1, 2, 8))) * np.exp(rng.normal(0, 0.3, (20, 2, 8)))
    shares = 0.2 / 8 + 0.8 * heads / heads.sum(axis=2, keepdims=True)
    kept = np.minimum(np.rint(1024 * 8 * shares), 4096).astype(np.int64)
    found = {
        charge: admission.simulate(kept, 8, "fair_copying", charge, fit=8, output=64, steps=120)
        for charge in admission.CHARGES
    }
    at_once = {charge: result[0] for charge, result in found.items()}
    assert at_once["first"] * 1.15 < at_once["bound"] < at_once["now"], at_once
    assert at_once["exact"] * 0.85 < at_once["now"] < at_once["exact"] * 1.05, at_once
    assert found["now"][2] < 0.05 and not any(found[c][2] for c in ("first", "bound", "exact"))


def test_requests_like_no_other_spill() -> None:
    """Each is judged by those with other prompts alone."""
    kept = np.full((9, 8, 8), 1024.0)
    kept[3:6] *= np.linspace(0.5, 1.5, 8)
    requests = Requests(kept, np.arange(9) // 3)
    assert 0 < admission.unseen(requests, 8, "contiguous") < 1
    requests = Requests(np.full((9, 8, 8), 1024.0), np.arange(9) // 3)
    assert admission.unseen(requests, 8, "contiguous") == 0

# SPDX-License-Identifier: Apache-2.0
"""The simulation of admission: what the server does leaves less idle than what it did."""

from __future__ import annotations

import numpy as np
import pytest

from fairkv_sglang.bench import admission


def test_copies_and_outputs_do_not_leave_pages_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks, a head on most of them copied, pages for sixteen requests."""
    monkeypatch.setattr(admission, "WARM_UP", 80)
    rng = np.random.default_rng(3)
    heads = np.exp(rng.normal(0, 1, (1, 2, 8))) * np.exp(rng.normal(0, 0.3, (20, 2, 8)))
    shares = 0.2 / 8 + 0.8 * heads / heads.sum(axis=2, keepdims=True)
    kept = np.minimum(np.rint(1024 * 8 * shares), 4096).astype(np.int64)
    found = {
        charge: admission.simulate(kept, 8, "fair_copying", charge, fit=16, output=64, steps=120)[0]
        for charge in admission.CHARGES
    }
    assert found["bound"] * 1.15 < found["now"] <= found["exact"] * 1.02, found

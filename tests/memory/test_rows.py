# SPDX-License-Identifier: Apache-2.0
"""Rows, ledger and head pages together, through random lives of requests on several ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_cases import QUICK, SCOPES, make_books, random_plan, random_scope, seeds
from engine_model import Engine
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.placement import Plan


@pytest.mark.parametrize("name", SCOPES)
@settings(QUICK, max_examples=25)
@given(
    seed=seeds,
    ranks=st.integers(1, 3),
    overlap=st.booleans(),
    mixed=st.booleans(),
    chunk=st.sampled_from([32, 64, 1000]),
    page_size=st.sampled_from([1, 16]),
)
def test_pages_of_random_lives(
    name: str, seed: int, ranks: int, overlap: bool, mixed: bool, chunk: int, page_size: int
) -> None:
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, 2, ranks, 4, copies=name != "rank")
    engine = Engine(
        rng,
        plan,
        random_scope(rng, name, 2, 4),
        overlap=overlap,
        mixed=mixed,
        chunk=chunk,
        page_size=page_size,
    )
    for _ in range(40):
        if rng.random() < 0.4:
            engine.submit()
        engine.turn()
    engine.drain()


def test_the_model_meets_what_it_is_for() -> None:
    """Retractions, aborts and overshoot happen in these runs."""
    totals = np.zeros(4, dtype=int)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        plan = random_plan(rng, 2, 2, 4)
        engine = Engine(
            rng,
            plan,
            random_scope(rng, "layer", 2, 4),
            overlap=True,
            mixed=False,
            chunk=48,
            page_size=1,
        )
        for _ in range(60):
            engine.submit()
            engine.turn()
        engine.drain()
        totals += [engine.finished, engine.retractions, engine.aborts, engine.overshoot]
    assert np.all(totals >= [50, 10, 3, 10]), totals

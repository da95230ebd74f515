# SPDX-License-Identifier: Apache-2.0
"""What decode steps read, against a plain count over all requests."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.memory.residents import Residents

LAYERS, RANKS, HEADS = 2, 3, 4


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), sliding=st.sampled_from([(), (0,), (1,)]))
def test_reads_and_counts_are_those_of_the_requests(seed: int, sliding: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    residents = Residents(LAYERS, RANKS, HEADS, sliding)
    owners: dict[int, np.ndarray] = {}
    kept: dict[int, np.ndarray] = {}
    steps: dict[int, int] = {}
    for _ in range(60):
        kind = rng.integers(5)
        row = int(rng.integers(6))
        if kind == 0 and row not in owners:
            owners[row] = rng.integers(0, RANKS, (LAYERS, HEADS)).astype(np.int16)
            steps[row] = 0
            residents.admit(row, owners[row])
        elif kind == 1 and row in owners and row not in kept:
            kept[row] = rng.integers(0, 50, (LAYERS, HEADS))
            residents.settle(row, kept[row])
        elif kind == 2 and row in owners:
            residents.release(row)
            del owners[row], steps[row]
            kept.pop(row, None)
        elif kind > 2:
            running = [r for r in owners if rng.random() < 0.7]
            residents.grow(running)
            residents.grow(list(running))
            for r in running:
                steps[r] += 2
        reads = np.zeros((LAYERS, RANKS), dtype=int)
        count = np.zeros((LAYERS, RANKS, HEADS), dtype=int)
        for r, of in owners.items():
            for layer in range(LAYERS):
                for head in range(HEADS):
                    rank = of[layer, head]
                    count[layer, rank, head] += 1
                    reads[layer, rank] += 0 if layer in sliding else steps[r]
                    reads[layer, rank] += kept[r][layer, head] if r in kept else 0
        assert (residents.reads == reads).all() and (residents.count == count).all()


def test_balancedness_is_that_of_the_last_steps_when_nothing_runs() -> None:
    residents = Residents(1, 2, 2)
    assert residents.balancedness() == 1.0
    residents.admit(1, np.array([[0, 1]]))
    residents.settle(1, np.array([[300, 100]]))
    assert residents.balancedness() == pytest.approx(200 / 300)
    residents.grow([1])
    residents.grow([1])
    residents.release(1)
    assert not residents.reads.any()
    assert residents.balancedness() == pytest.approx((201 + 202) / (301 + 302))

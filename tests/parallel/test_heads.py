# SPDX-License-Identifier: Apache-2.0
"""Lanes of a rank, who owns and who scores them."""

from __future__ import annotations

import numpy as np
from core_cases import QUICK, random_owners, random_plan, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.parallel import RankHeads


@settings(QUICK, max_examples=60)
@given(seed=seeds, ranks=st.integers(1, 4), heads=st.integers(1, 6))
def test_every_head_is_scored_and_owned_once(seed: int, ranks: int, heads: int) -> None:
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, 3, ranks, heads)
    owners = random_owners(rng, plan)
    scored = np.zeros((3, heads), dtype=int)
    owned = np.zeros((3, heads), dtype=int)
    for rank in range(ranks):
        mine = RankHeads(plan, rank, 2)
        assert mine.num_lanes == len(mine.lane_layer) == len(mine.lane_head)
        served = mine.owned(owners)
        for layer in range(3):
            lanes = range(mine.lane_start[layer], mine.lane_start[layer + 1])
            assert tuple(mine.lane_head[lanes]) == mine.heads[layer] == plan.heads(layer, rank)
            assert set(mine.lane_layer[lanes]) == {layer}
            for local in mine.primary[layer]:
                scored[layer, mine.heads[layer][local]] += 1
            for local, lane in enumerate(lanes):
                head = mine.heads[layer][local]
                assert served[lane] == (owners[layer, head] == rank)
                owned[layer, head] += served[lane]
            copied = any(len(plan.copies()[layer][head]) > 1 for head in mine.heads[layer])
            assert (layer in mine.layers_with_copies()) == copied
    assert np.all(scored == 1) and np.all(owned == 1)

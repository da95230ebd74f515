# SPDX-License-Identifier: Apache-2.0
"""Lanes and home heads of a rank, and who owns the lanes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings

from fairkv_sglang.parallel import RankHeads
from fairkv_sglang.placement import Plan
from fairkv_tests.core_cases import QUICK, random_owners, random_plan, seeds, splits


@settings(QUICK, max_examples=80)
@given(seed=seeds, split=splits)
def test_every_head_is_owned_once(seed: int, split: tuple[int, int]) -> None:
    heads, ranks = split
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, 3, ranks, heads)
    owners = random_owners(rng, plan)
    owned = np.zeros((3, heads), dtype=int)
    for rank in range(ranks):
        mine = RankHeads(plan, rank, 2)
        assert mine.num_lanes == len(mine.lane_layer) == len(mine.lane_head)
        assert mine.lane_start == tuple(plan.lane_start(rank))
        served = mine.owned(owners)
        assert served.dtype == np.uint8
        for layer in range(3):
            lanes = range(mine.lane_start[layer], mine.lane_start[layer + 1])
            assert tuple(mine.lane_head[lanes]) == mine.heads[layer] == plan.heads(layer, rank)
            assert set(mine.lane_layer[lanes]) == {layer}
            for local, lane in enumerate(lanes):
                head = mine.heads[layer][local]
                assert served[lane] == (owners[layer, head] == rank)
                owned[layer, head] += served[lane]
    assert np.all(owned == 1)


@settings(QUICK, max_examples=80)
@given(seed=seeds, split=splits)
def test_homes_are_sglangs_split_whatever_the_plan(seed: int, split: tuple[int, int]) -> None:
    """SGLang's rule: max(1, heads / ranks) heads per rank, replicas on neighbouring ranks."""
    heads, ranks = split
    plan = random_plan(np.random.default_rng(seed), 2, ranks, heads)
    for rank in range(ranks):
        mine = RankHeads(plan, rank, 4)
        count = max(1, heads // ranks)
        first = rank * heads // ranks
        assert mine.home == tuple(range(first, first + count))
        assert mine.homes.per_rank == count and mine.homes.replicas == max(1, ranks // heads)
        column = mine.home_column
        assert column.dtype == np.int64 and column.shape == (heads,)
        for head in range(heads):
            assert column[head] == (mine.home.index(head) if head in mine.home else -1)
            assert (rank in mine.homes.ranks(head)) == (head in mine.home)


@settings(QUICK, max_examples=80)
@given(seed=seeds, split=splits)
def test_serves_home_asks_for_all_heads_in_their_order(seed: int, split: tuple[int, int]) -> None:
    heads, ranks = split
    plan = random_plan(np.random.default_rng(seed), 3, ranks, heads)
    for rank in range(ranks):
        mine = RankHeads(plan, rank, 2)
        for layer in range(3):
            same = list(plan.heads(layer, rank)) == list(mine.home) and heads >= ranks
            assert mine.serves_home(layer) == same
            for other in range(ranks):
                theirs = RankHeads(plan, other, 2).serves_home(layer)
                assert mine.serves_home(layer, other) == theirs


def test_serves_home_by_hand() -> None:
    layer = [[1, 1, 0, 0], [0, 0, 1, 1]]
    contiguous = Plan.from_shares(np.array([layer], dtype=float), "contiguous")
    assert all(RankHeads(contiguous, rank, 1).serves_home(0) for rank in (0, 1))
    swapped = Plan.from_shares(np.array([layer[::-1]], dtype=float), "swapped")
    assert not any(RankHeads(swapped, rank, 1).serves_home(0) for rank in (0, 1))
    # A copy beside the home heads: the lanes are more than those; the other rank's are not.
    shares = np.array([[[1, 1, 0.5, 0], [0, 0, 0.5, 1]]])
    copied = Plan.from_shares(shares, "copied")
    assert [RankHeads(copied, rank, 1).serves_home(0) for rank in (0, 1)] == [False, True]


def test_a_replica_is_not_whole() -> None:
    """Fewer heads than ranks: SGLang's module has a part of the query heads, a lane has all."""
    shares = np.full((1, 2, 1), 0.5)
    plan = Plan.from_shares(shares, "both")
    for rank in (0, 1):
        mine = RankHeads(plan, rank, 2)
        assert mine.home == mine.heads[0] == (0,) and not mine.serves_home(0)

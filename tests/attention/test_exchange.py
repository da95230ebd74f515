# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other of their home heads: all heads, in head order, the same on all."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.attention import exchange
from fairkv_sglang.attention.exchange import HomeExchange
from fairkv_sglang.placement.homes import Homes
from fairkv_tests.core_cases import QUICK, seeds, splits
from fairkv_tests.fake_collectives import Group, ranks_as_threads


@settings(QUICK, max_examples=60)
@given(
    seed=seeds,
    split=splits.filter(lambda split: split[1] > 1),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3),
)
def test_scores_of_all_heads(seed: int, split: tuple[int, int], lengths: list[int]) -> None:
    """A head with several homes has the mean over its query heads, wherever those are."""
    heads, ranks = split
    homes, group_size = Homes(heads, ranks), 4
    rng = np.random.default_rng(seed)
    queries = [torch.from_numpy(rng.random((heads, group_size, n), "float32")) for n in lengths]
    part = group_size // homes.replicas

    def work(rank: int, group: Group) -> list[torch.Tensor]:
        mine = list(homes.heads(rank))
        first = homes.ranks(mine[0]).index(rank) * part
        scores = [table[mine, first : first + part].mean(1) for table in queries]
        return HomeExchange(homes, group).scores(scores)  # type: ignore[arg-type]

    found, collectives = ranks_as_threads(ranks, [exchange], work)
    assert collectives.count("all_gather") == (sum(lengths) > 0)
    assert collectives.bytes_sent == [4 * homes.per_rank * sum(lengths)] * ranks
    for tables in found:
        for table, first, query in zip(tables, found[0], queries, strict=True):
            assert torch.equal(table, first), "ranks would select differently"
            torch.testing.assert_close(table, query.mean(1))


@settings(QUICK, max_examples=60)
@given(
    seed=seeds,
    split=splits.filter(lambda split: split[1] > 1),
    layers=st.sampled_from([(), (1,), (3,), (2, 2)]),
)
def test_counts_of_all_heads(seed: int, split: tuple[int, int], layers: tuple[int, ...]) -> None:
    heads, ranks = split
    homes = Homes(heads, ranks)
    every = torch.from_numpy(np.random.default_rng(seed).integers(0, 99, (*layers, heads)))

    def work(rank: int, group: Group) -> torch.Tensor:
        return HomeExchange(homes, group).counts(every[..., list(homes.heads(rank))])  # type: ignore[arg-type]

    found, _ = ranks_as_threads(ranks, [exchange], work)
    for counts in found:
        assert torch.equal(counts, every) and counts.dtype == torch.int64
        assert counts.is_contiguous()

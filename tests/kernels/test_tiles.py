# SPDX-License-Identifier: Apache-2.0
"""The device-side FlashInfer plan against a scalar restatement of FlashInfer's planner."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.kernels.cuda.tiles import Fold, csr_starts, plan_tiles
from fairkv_tests.flashinfer_model import scalar_plan


def test_golden_case() -> None:
    lens = torch.tensor([[0, 40, 129, 1000]])
    plan = plan_tiles(lens, 4, longest_first=False)
    assert plan.chunk.tolist() == [[384]]
    assert plan.pages.tolist() == [[0, 3, 9, 63]]
    assert plan.last_page_len.tolist() == [[0, 8, 1, 8]]
    assert plan.o_indptr.tolist() == [[0, 0, 1, 2, 5]]
    assert plan.request.tolist() == [[1, 2, 3, 3, 3, 0, 0, 0]]
    assert plan.kv_tile.tolist() == [[0, 0, 0, 1, 2, 0, 0, 0]]
    assert plan.valid.sum() == 5
    plan = plan_tiles(lens, 4)
    assert plan.request.tolist() == [[3, 3, 3, 2, 1, 0, 0, 0]]
    assert plan.kv_tile.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0]]
    assert plan.valid.tolist() == [[True] * 5 + [False] * 3]


LENGTH = st.one_of(st.integers(0, 40), st.integers(0, 5000), st.sampled_from([0, 127, 128, 129]))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(LENGTH, min_size=6, max_size=6), min_size=1, max_size=3),
    st.integers(1, 40),
)
def test_equals_scalar_restatement(lens: list[list[int]], spare: int) -> None:
    plain = plan_tiles(torch.tensor(lens), spare, longest_first=False)
    sorted_ = plan_tiles(torch.tensor(lens), spare)
    for layer, of_layer in enumerate(lens):
        chunk, o_indptr, tiles = scalar_plan(of_layer, spare)
        count = len(tiles)
        assert count <= len(of_layer) + spare
        for plan in (plain, sorted_):
            assert plan.chunk[layer].tolist() == [chunk]
            assert plan.o_indptr[layer].tolist() == o_indptr
            assert plan.valid[layer].tolist() == [j < count for j in range(6 + spare)]
            assert not plan.request[layer, count:].any()
            pages, last = plan.pages[layer].tolist(), plan.last_page_len[layer].tolist()
            assert [(p - 1) * 16 + n if p else 0 for p, n in zip(pages, last, strict=True)] == (
                of_layer
            )
        pairs = list(zip(plain.request[layer].tolist(), plain.kv_tile[layer].tolist(), strict=True))
        assert pairs[:count] == tiles
        ordered = [
            (int(sorted_.request[layer, j]), int(sorted_.kv_tile[layer, j])) for j in range(count)
        ]
        assert sorted(ordered) == tiles
        sizes = [min(chunk, of_layer[row] - tile * chunk) for row, tile in ordered]
        assert sizes == sorted(sizes, reverse=True)
        assert all(size > 0 for size in sizes)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="spare"):
        plan_tiles(torch.ones(1, 1), 0)
    for bs, lane_start in ((0, [0, 1]), (1, [0, 1, 1]), (1, [0]), (1, [1, 2])):
        with pytest.raises(ValueError, match="at least one head"):
            Fold.create(bs, lane_start, "cpu")


def test_fold_orders_rows_like_a_view_of_q() -> None:
    """Uneven heads per layer: 1, 3 and 2 lanes."""
    bs, lane_start = 3, [0, 1, 4, 6]
    fold = Fold.create(bs, lane_start, "cpu")
    assert fold.rows == (3, 9, 6)
    make = torch.Generator().manual_seed(0)
    lens = torch.randint(1, 90, (5, 6), generator=make, dtype=torch.int32)
    owned = torch.randint(0, 2, (5, 6), generator=make, dtype=torch.uint8)
    rows = torch.tensor([4, 0, 2])
    got = fold.lens(lens, owned, rows)
    plan = plan_tiles(got, 4)
    starts = csr_starts(plan.pages)
    listed = 0
    for layer in range(3):
        n = lane_start[layer + 1] - lane_start[layer]
        # The order of q[bs, n, D].view(bs * n, D).
        names = [(int(r), lane_start[layer] + h) for r in rows for h in range(n)]
        expected = [int(lens[c]) * int(owned[c]) for c in names]
        assert got[layer].tolist() == expected + [0] * (9 - len(expected))
        for r, tokens in enumerate(expected):
            assert int(starts[layer, r]) == listed
            listed += -(-tokens // 16)
            assert int(starts[layer, r + 1]) == listed

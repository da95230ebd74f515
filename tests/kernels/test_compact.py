# SPDX-License-Identifier: Apache-2.0
"""Head pages made shorter in place: the order stays, pages come back, others are not touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.kernels import HeadPages
from fairkv_sglang.kernels.compact import compact, keys_of
from fairkv_sglang.kernels.torch_decode import gather
from fairkv_tests.core_cases import QUICK, seeds

ROWS, LANES, DIM, PAGES = 4, 3, 8, 400


def filled(rng: np.random.Generator, by_columns: bool, dtype: torch.dtype) -> HeadPages:
    """Rows that have grown in turn, so that their pages lie mixed, up to several runs long."""
    pages = HeadPages.create(PAGES, ROWS, LANES, 40, DIM, dtype, by_columns=by_columns)
    for row in range(1, ROWS):
        pages.owned[row] = torch.from_numpy(rng.integers(0, 2, LANES).astype(np.uint8))
    pages.owned[1] = 1
    slots = torch.empty((ROWS - 1, LANES), dtype=torch.int64)
    for _ in range(int(rng.integers(1, 300))):
        rows = torch.arange(1, ROWS)[: int(rng.integers(1, ROWS))]
        pages.kernels.grow(pages, rows, slots[: len(rows)])
    pages.keys.copy_(torch.from_numpy(rng.normal(size=pages.keys.shape)))
    pages.v_pages.copy_(torch.from_numpy(rng.normal(size=pages.v_pages.shape)))
    return pages


@pytest.mark.parametrize(
    ("by_columns", "dtype"),
    [(True, torch.float32), (True, torch.bfloat16), (False, torch.float16)],
    ids=["columns", "columns of pairs", "rows"],
)
@settings(QUICK, max_examples=30)
@given(seed=seeds, whole=st.booleans())
def test_compact(by_columns: bool, dtype: torch.dtype, seed: int, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    pages = filled(rng, by_columns, dtype)
    before = {
        (row, lane): gather(pages, row, lane) for row in range(1, ROWS) for lane in range(LANES)
    }
    chosen = [
        (row, lane)
        for row, lane in before
        if pages.owned[row, lane] and (whole or rng.random() < 0.6)
    ]
    held = np.array([len(before[entry][0]) for entry in chosen], dtype=np.int64)
    counts = np.array([rng.integers(0, n + 1) for n in held], dtype=np.int64)
    kept = torch.full((len(chosen), int(counts.max(initial=0)) + 2), -7)  # what follows is not read
    for e, (n, count) in enumerate(zip(held, counts, strict=True)):
        kept[e, :count] = torch.from_numpy(np.sort(rng.permutation(n)[:count]))
    rows, lanes = (np.array([entry[i] for entry in chosen], dtype=np.int64) for i in (0, 1))
    free = pages.num_free

    compact(pages, rows, lanes, held, counts, kept)

    pages.check_integrity()  # no page is lost or held twice
    assert pages.num_free - free == (-(-held // 16) - -(-counts // 16)).sum()
    for entry, (k, v) in before.items():
        stays = torch.arange(len(k))
        if entry in chosen:
            e = chosen.index(entry)
            stays = kept[e, : counts[e]]
        now_k, now_v = gather(pages, *entry)
        assert torch.equal(now_k, k[stays]) and torch.equal(now_v, v[stays])


def test_freed_pages_are_taken_again_in_ascending_order() -> None:
    """As after a release: neighbouring pages are read faster."""
    pages = HeadPages.create(20, 2, 1, 20, DIM, torch.float32)
    pages.owned[1] = 1
    slots = torch.empty((1, 1), dtype=torch.int64)
    for _ in range(6 * 16):
        pages.kernels.grow(pages, torch.tensor([1]), slots)
    one = np.ones(1, dtype=np.int64)
    compact(pages, one, 0 * one, 96 * one, 20 * one, torch.arange(20)[None])
    taken = []
    for _ in range(5 * 16):
        pages.kernels.grow(pages, torch.tensor([1]), slots)
        taken.append(int(slots) // 16)
    assert list(dict.fromkeys(taken)) == [1, 2, 3, 4, 5, 6]


def test_keys_of_lanes_of_different_lengths() -> None:
    rng = np.random.default_rng(5)
    pages = filled(rng, True, torch.float32)
    held = [int(n) for n in pages.lens[1]]
    for lane, n in enumerate(held):
        found = keys_of(pages, 1, np.array([lane]), n)
        assert torch.equal(found[0], gather(pages, 1, lane)[0])
    together = keys_of(pages, 1, np.arange(LANES), max(held))
    assert together.shape == (LANES, max(held), DIM)
    for lane, n in enumerate(held):
        assert torch.equal(together[lane, :n], gather(pages, 1, lane)[0])

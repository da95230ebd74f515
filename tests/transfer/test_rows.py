# SPDX-License-Identifier: Apache-2.0
"""Kept rows from the head pages of some ranks into those of others, by (layer, head, page)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.kernels import PAGE_TOKENS, HeadPages
from fairkv_sglang.parallel import RankHeads
from fairkv_sglang.placement import Plan
from fairkv_sglang.transfer import wire
from fairkv_sglang.transfer.rows import KeptRows, gather, store
from fairkv_tests.core_cases import QUICK, make_books, random_owners, random_plan, seeds, splits
from fairkv_tests.core_cases import random_scope as scope_of

LAYERS, DIM, ROW, MOST = 2, 16, 3, 300


def arenas(plan: Plan, owners: np.ndarray, dtype: torch.dtype) -> list[tuple[HeadPages, RankHeads]]:
    """Each rank's, with a row that owns its lanes."""
    found = []
    for rank in range(plan.tp_size):
        heads = RankHeads(plan, rank, 1)
        pages = HeadPages.create(2000, 5, heads.num_lanes, 40, DIM, dtype)
        pages.kernels.set_owned(pages, ROW, torch.from_numpy(heads.owned(owners)))
        found.append((pages, heads))
    return found


def fill(
    pages: HeadPages, heads: RankHeads, k: torch.Tensor, v: torch.Tensor, kept: np.ndarray
) -> None:
    """Store the first ``kept [L, H]`` tokens of ``k, v [L, MOST, H, D]``, as compression does."""
    places = torch.arange(MOST).repeat(kept.shape[1], 1)
    for layer in range(LAYERS):
        pages.kernels.store_kept(
            pages,
            ROW,
            heads.lane_start[layer],
            k[layer],
            v[layer],
            torch.arange(MOST),
            places,
            torch.from_numpy(kept[layer]),
            torch.from_numpy(heads.slots(layer)),
        )


def held(pages: HeadPages, lane: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a lane of the row, token by token."""
    count = int(pages.lens[ROW, lane])
    at = [(int(pages.page(ROW, lane, t // PAGE_TOKENS)), t % PAGE_TOKENS) for t in range(count)]
    k = [pages.keys[page, offset].reshape(DIM) for page, offset in at]
    v = [pages.v_pages[page, offset] for page, offset in at]
    return torch.stack(k), torch.stack(v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(QUICK, max_examples=12)
@given(seed=seeds, split=splits, receivers=st.sampled_from([1, 2, 3]))
def test_rows_arrive_where_they_are_owned(
    dtype: torch.dtype, seed: int, split: tuple[int, int], receivers: int
) -> None:
    """Any plan, any number of ranks on either side, through the wire's format."""
    rng = np.random.default_rng(seed)
    heads, senders = split
    there = random_plan(rng, LAYERS, senders, heads)
    here = random_plan(rng, LAYERS, min(receivers, heads), heads)
    from_owners, to_owners = random_owners(rng, there), random_owners(rng, here)
    kept = rng.integers(1, MOST + 1, (LAYERS, heads))
    shape = (LAYERS, MOST, heads, DIM)
    k, v = (torch.from_numpy(rng.normal(size=shape)).to(dtype) for _ in range(2))

    sources = arenas(there, from_owners, dtype)
    for pages, lanes in sources:
        fill(pages, lanes, k, v, kept)
    moved = 0
    for rank, (pages, lanes) in enumerate(arenas(here, to_owners, dtype)):
        for sender, (source, its) in enumerate(sources):
            wanted = (to_owners == rank) & (from_owners == sender)
            rows = gather(source, its, ROW, wanted, kept)
            moved += rows.bytes
            header, parts = wire.pack_rows(rows)
            store(pages, lanes, ROW, wire.unpack_rows(header, parts))
        pages.check_integrity()
        mine = np.flatnonzero(lanes.owned(to_owners))
        for lane, layer, head in zip(
            mine, lanes.lane_layer[mine], lanes.lane_head[mine], strict=True
        ):
            keys, values = held(pages, lane)
            assert torch.equal(keys, k[layer, : kept[layer, head], head])
            assert torch.equal(values, v[layer, : kept[layer, head], head])
    assert moved == 2 * int(kept.sum()) * DIM * k.element_size()


def test_a_message_that_does_not_fit_together_is_refused() -> None:
    rows = KeptRows(np.array([[0, 1]]), np.array([2]), torch.ones(2, DIM), torch.ones(2, DIM))
    header, parts = wire.pack_rows(rows)
    for wrong_header, wrong_parts in (
        (header, [*parts[:2], parts[2][:-4], parts[3]]),
        (header, parts[:3]),
        ({**header, "dtype": "no such"}, parts),
        ({"dim": DIM}, parts),
    ):
        with pytest.raises(wire.WireError):
            wire.unpack_rows(wrong_header, wrong_parts)
    for frames in ([], [b"hello"], [b"hello", b"{"], [b"\xff", b"{}"], [b"hello", b"[]"]):
        with pytest.raises(wire.WireError):
            wire.unpack(frames)


@settings(QUICK, max_examples=10)
@given(seed=seeds, freed=st.booleans())
def test_a_row_of_another_server_is_charged_what_comes(seed: int, freed: bool) -> None:
    """Exactly, on every rank, before it comes; one that ends before that leaves nothing."""
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, LAYERS, 2, 4)
    books = make_books(plan, scope_of(rng, "layer", LAYERS, 4, 2), np.array([900, 900]))
    kept = rng.integers(1, MOST + 1, (LAYERS, 4))
    v = k = torch.from_numpy(rng.normal(size=(int(kept.sum()), 8))).float()
    grid = np.argwhere(np.ones_like(kept))
    rows = KeptRows(grid, kept.ravel(), k, v)
    for book in books:
        book.admission.promise(book.admission.ask_kept(1000, kept))
        book.admit(ROW, 1000)
        book.note_kept(ROW, torch.from_numpy(kept))
        assert not book.hand_over(ROW, 0)

        def put(book: object = book) -> None:
            store(book.pages, book.heads, ROW, rows)  # type: ignore[attr-defined]

        book.receive(ROW, put)
        if freed:
            book.free(ROW)
        book.begin_forward([])
    owners = books[0].owners(ROW) if not freed else None
    for rank, book in enumerate(books):
        assert book.pages.num_used == book.ledger.held[rank]
        if owners is not None:
            assert (book.owners(ROW) == owners).all() and book.pages.num_used > 0
            book.free(ROW)
        assert book.check_idle() == []

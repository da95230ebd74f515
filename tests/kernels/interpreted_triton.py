# SPDX-License-Identifier: Apache-2.0
"""Triton kernels against their torch twins; run by test_triton.py in a process of its own.

Triton decides at import whether its kernels are compiled or interpreted, so these tests need
TRITON_INTERPRET=1 in the environment before Python starts. On a machine with CUDA (and without that
variable) the same tests run the compiled kernels on the GPU.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from fairkv_sglang.attention.warm_up import warm_up
from fairkv_sglang.budgets.scorers.snapkv import SnapKV
from fairkv_sglang.budgets.scorers.streaming import Streaming
from fairkv_sglang.kernels import HeadPages, layout
from fairkv_sglang.kernels.cuda import attention, flashinfer, operations, score, tiles
from fairkv_tests import gpu_checks, reference
from fairkv_tests.flashinfer_model import FlashInferModel
from fairkv_tests.launches import launches

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
LENS = [[0, 0, 0], [1, 15, 16], [17, 0, 70], [64, 130, 3]]


def on_device(pages: HeadPages) -> HeadPages:
    names = [f.name for f in fields(pages) if f.name not in ("kernels", "_host")]
    moved = {name: getattr(pages, name).to(DEVICE, copy=True) for name in names}
    return HeadPages(**moved, kernels=operations)


def same(fast: HeadPages, slow: HeadPages) -> None:
    """Equal contents; free stacks equal up to their top."""
    fast.check_integrity()
    for name in ("lens", "owned", "free_count", "room", "turn"):
        assert torch.equal(getattr(fast, name).cpu(), getattr(slow, name)), name
    top = slow.num_free
    assert torch.equal(fast.free_pages[:top].cpu(), slow.free_pages[:top])
    for row in range(slow.rows):
        for lane in range(slow.lanes):
            for a, b in zip(
                reference.gather(fast, row, lane), reference.gather(slow, row, lane), strict=True
            ):
                assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("block", [4, 1024])
def test_grow_and_append(
    filled: Callable[..., HeadPages], monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(operations, "GROW_BLOCK", block)
    owned = [[0, 0, 0], [1, 1, 1], [1, 0, 1], [1, 1, 1]]
    slow = filled(LENS, 24, owned=owned, by_columns=False)
    slow.most[2] = 16  # rows 1 and 2 are full
    slow.turn[1:, 2] = torch.tensor([15, 7, 0])
    fast = on_device(slow)
    rows = torch.tensor([3, 0, 1, 2, 0])
    make = torch.Generator().manual_seed(3)
    for _ in range(2):
        slots = torch.full((5, 4), -9)[:, :3]
        got = torch.full((5, 7), -9, device=DEVICE)[:, 2:5]
        reference.grow(slow, rows, slots)
        operations.grow(fast, rows.to(DEVICE), got)
        assert torch.equal(got.cpu(), slots)
        fused = torch.randn((5, 9, 24), generator=make)
        k, v = fused[:, 3:5], fused[:, 6:8]
        reference.append(slow, slots[:, 1:], k, v)
        fused = fused.to(DEVICE)
        operations.append(fast, got[:, 1:], fused[:, 3:5], fused[:, 6:8])
        # Lane 0 has no new rows yet: give both the same.
        reference.append(slow, slots[:, :1], k[:, :1], v[:, :1])
        operations.append(fast, got[:, :1], fused[:, 3:4], fused[:, 6:7])
        same(fast, slow)


def test_exhausted_arena_sets_the_error_bit_and_damages_nothing() -> None:
    pages = HeadPages.create(2, 3, 2, 1, 16, torch.float32, DEVICE, by_columns=False)
    everything = torch.ones(2, dtype=torch.uint8, device=DEVICE)
    operations.set_owned(pages, 1, everything)
    operations.set_owned(pages, 2, everything)
    slots = torch.empty((2, 2), dtype=torch.int64, device=DEVICE)
    operations.grow(pages, torch.tensor([1, 2], device=DEVICE), slots)
    assert slots.tolist() == [[0, 16], [-1, -1]]
    assert pages.lens.tolist() == [[0, 0], [1, 1], [0, 0]]
    with pytest.raises(RuntimeError, match="no free head page"):
        pages.check_integrity()
    pages.error.zero_()
    pages.check_integrity()
    for _ in range(15):
        operations.grow(pages, torch.tensor([1], device=DEVICE), slots[:1])
    pages.check_integrity()
    pages.lens[1] = pages.max_pages * 16
    operations.grow(pages, torch.tensor([1], device=DEVICE), slots[:1])
    assert slots[0].tolist() == [-1, -1]
    assert int(pages.error) == layout.ERROR_ROW_FULL
    pages.error.zero_()
    pages.lens[1] = 16
    pages.check_integrity()
    operations.set_owned(pages, 1, everything)
    assert int(pages.error) == layout.ERROR_ROW_NOT_EMPTY


@pytest.mark.parametrize(
    ("m", "columns"),
    [
        (2, None),
        (2, [1, 0]),
        (2, [1, 1]),
        (3, [2, 0]),
        (3, [-1, 2]),
        (1, [0, -1]),
        (1, [-1, -7]),
        (0, [-1, -1]),
    ],
)
@pytest.mark.parametrize("expanded", [False, True])
def test_store_kept_and_release(
    filled: Callable[..., HeadPages], m: int, columns: list[int] | None, expanded: bool
) -> None:
    """Row 2 owns lane 2 of lanes 1 and 2 that are stored, row 3 both."""
    owned = [[0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1]]
    lens = [[0, 0, 0], [30, 16, 3], [0, 0, 0], [1, 0, 40]]
    slow = filled(lens, 24, owned=owned, by_columns=False)
    fast = on_device(slow)
    make = torch.Generator().manual_seed(5)
    pool = torch.randn((60, 7, 24), generator=make)
    slots = torch.randperm(60, generator=make)[:50]
    lanes = list(range(m)) if columns is None else columns
    # What nobody reads is out of range: positions past a count, counts that no lane takes.
    kept = torch.full((m, 40), 10**6)
    counts = torch.tensor([33, 17, 16][:m], dtype=torch.int64)
    for c, count in enumerate(counts.tolist()):
        kept[c, :count] = torch.randperm(50, generator=make)[:count].sort().values
        if c not in lanes:
            counts[c] = 10**6

    def store(module: object, pages: HeadPages, row: int) -> None:
        to = pages.device
        k, v = pool.to(to)[:, 1 : 1 + m], pool.to(to)[:, 4 : 4 + m]
        if expanded:
            k, v = (x.to(to)[:, :1].expand(-1, m, -1) for x in (pool, pool[:, 5:]))
        rest = (slots.to(to), kept.to(to), counts.to(to))
        where = None if columns is None else torch.tensor(columns, device=to)
        module.store_kept(pages, row, 1, k, v, *rest, where)  # type: ignore[attr-defined]

    for module, pages in ((reference, slow), (operations, fast)):
        module.release(pages, torch.tensor([3, 3, 0], device=pages.device))
        module.set_owned(pages, 2, torch.tensor([1, 0, 1], dtype=torch.uint8).to(pages.device))
        module.set_owned(pages, 3, torch.tensor([0, 1, 1], dtype=torch.uint8).to(pages.device))
        store(module, pages, 2)
        store(module, pages, 3)
    same(fast, slow)
    assert fast.lens[2:, 1:].tolist() == [
        [int(counts[c]) if mine and c >= 0 else 0 for c, mine in zip(lanes, owns, strict=True)]
        for owns in ((0, 1), (1, 1))
    ]
    for module, pages in ((reference, slow), (operations, fast)):
        module.release(pages, torch.tensor([3], device=pages.device))
    # Row 1 holds pages: refused as a whole, unless no lane takes anything.
    before = fast.lens.clone()
    store(operations, fast, 1)
    bit = layout.ERROR_ROW_NOT_EMPTY if max(lanes) >= 0 else 0
    assert int(fast.error) == bit
    assert torch.equal(fast.lens, before)
    fast.error.zero_()
    same(fast, slow)
    for module, pages in ((reference, slow), (operations, fast)):
        module.release(pages, torch.tensor([1, 2], device=pages.device))
    same(fast, slow)
    assert fast.num_used == 0


def test_store_kept_into_a_full_arena_changes_nothing() -> None:
    for num_pages, tokens, columns, bit in (
        (2, 20, None, layout.ERROR_NO_FREE_PAGE),
        (3, 20, [0, 0], layout.ERROR_NO_FREE_PAGE),
        (1, 20, [0, -1], layout.ERROR_NO_FREE_PAGE),
        (19, 257, None, layout.ERROR_ROW_FULL),
        (9, 20, [1, 2], layout.ERROR_INDEX),
        (9, 20, [2**40, -1], layout.ERROR_INDEX),
        (1, 20, [-1, 1], 0),
        (2, 20, [1, 1], 0),
    ):
        pages = HeadPages.create(num_pages, 2, 2, 16, 16, torch.float32, DEVICE, by_columns=False)
        operations.set_owned(pages, 1, torch.ones(2, dtype=torch.uint8, device=DEVICE))
        pool = torch.ones((260, 2, 16), device=DEVICE)
        at = torch.arange(260, device=DEVICE)
        counts = torch.tensor([tokens, 3], device=DEVICE)
        where = None if columns is None else torch.tensor(columns, device=DEVICE)
        operations.store_kept(pages, 1, 0, pool, pool, at, at.repeat(2, 1), counts, where)
        assert int(pages.error) == bit
        assert pages.num_used == (0 if bit else num_pages)
        assert bool(pages.lens.any()) == (bit == 0)
        pages.error.zero_()
        pages.check_integrity()


def test_a_prompt_takes_no_more_pages_than_it_has_room_for() -> None:
    """Layer by layer, several prompts at once; the others get theirs, and it is no error."""
    make = torch.Generator().manual_seed(9)
    slow = HeadPages.create(14, 4, 6, 4, 24, torch.float32, by_columns=False)
    for pages in (slow, fast := on_device(slow)):
        module = reference if pages is slow else operations
        for row, room in ((1, 4), (2, 5), (3, layout.UNLIMITED)):
            module.set_owned(pages, row, torch.ones(6, dtype=torch.uint8).to(pages.device), room)
    rows = torch.tensor([1, 2, 3])
    pool = torch.randn((70, 2, 24), generator=make)
    context = torch.randperm(70, generator=make).int().expand(4, -1)
    kept = torch.arange(50).expand(3, 2, -1)
    columns = torch.tensor([[0, 1]]).expand(3, -1)
    for layer, tokens in enumerate(([[17, 2], [16, 1], [3, 0]], [[1, 17], [16, 33], [16, 17]])):
        counts = torch.tensor(tokens)
        operations.prompts.store_all_kept(
            fast, rows.to(DEVICE), 2 * layer, pool.to(DEVICE), pool.to(DEVICE), context.to(DEVICE),
            kept.to(DEVICE), counts.to(DEVICE), columns.to(DEVICE),
        )  # fmt: skip
        for p, row in enumerate(rows.tolist()):
            where = (context[row].long(), kept[p], counts[p], columns[p])
            reference.store_kept(slow, row, 2 * layer, pool, pool, *where)
        same(fast, slow)
    assert fast.room[:3].tolist() == [layout.UNLIMITED, 0, 0]
    assert fast.lens[1:].tolist() == [
        [17, 2, 0, 0, 0, 0], [16, 1, 0, 0, 0, 0], [3, 0, 16, 17, 0, 0]
    ]  # fmt: skip
    assert fast.num_used == 3 + 2 + 4 and int(fast.error) == 0


def test_store_kept_refuses_wrong_shapes() -> None:
    pages = HeadPages.create(9, 2, 2, 2, 16, torch.float32, DEVICE, by_columns=False)
    pool, at = torch.ones((20, 1, 16), device=DEVICE), torch.arange(20, device=DEVICE)
    kept, counts, columns = at[None], at[:1], at[:2] * 0
    wide = torch.ones((20, 1, 32), device=DEVICE)[..., ::2]
    for bad, message in (
        ((pool, pool.expand(-1, 2, -1), at, kept, counts, columns), "must have 1 columns"),
        ((pool, pool, at, kept, at[:2], columns), "must have 1 columns"),
        ((pool, pool, at, kept.repeat(2, 1), counts, columns), "must have 2 columns"),
        ((pool, wide, at, kept, counts, columns), "contiguous in their last dimension"),
        ((pool, pool, at, kept, counts, at[:3] * 0), "3 lanes from 0 on, of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            operations.store_kept(pages, 1, 0, *bad)
    operations.store_kept(pages, 1, 2, pool, pool, at, kept, counts, at[:0])  # a layer of no lanes
    pages.check_integrity()


@pytest.mark.parametrize(("group", "dim"), [(1, 16), (5, 24), (8, 32)])
def test_decode(filled: Callable[..., HeadPages], group: int, dim: int) -> None:
    owned = [[0, 0, 0], [1, 1, 1], [1, 0, 1], [1, 1, 1]]
    slow = filled(LENS, dim, owned=owned, by_columns=False)
    fast = on_device(slow)
    fused = torch.randn((4, 3 * (group + 2), dim), generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([2, 0, 3, 1])
    for lane_lo, n in ((0, 3), (1, 1)):
        q = fused[:, : n * group]
        out = torch.full(q.shape, torch.nan, device=DEVICE)
        want = torch.empty(q.shape)
        args = (lane_lo, n, dim**-0.5)
        attention.decode(fast, fused.to(DEVICE)[:, : n * group], rows.to(DEVICE), *args, out)
        reference.decode(slow, q, rows, *args, want)
        torch.testing.assert_close(out.cpu(), want, atol=3e-6, rtol=3e-6)
        assert bool((out[1] == 0).all())
        sinks = torch.linspace(-9, 9, n * group).bfloat16()
        attention.decode(
            fast, fused.to(DEVICE)[:, : n * group], rows.to(DEVICE), *args, out, sinks.to(DEVICE)
        )
        reference.decode(slow, q, rows, *args, want, sinks)
        torch.testing.assert_close(out.cpu(), want, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(
    ("window", "total", "n", "group", "dim"),
    [(4, 70, 2, 3, 24), (32, 100, 1, 2, 16), (5, 6, 1, 1, 16), (8, 8, 1, 1, 16)],
)
def test_snapkv_score(window: int, total: int, n: int, group: int, dim: int) -> None:
    make = torch.Generator().manual_seed(2)
    q = torch.randn((window, n, group + 1, dim), generator=make)[:, :, 1:]
    k = 3 * torch.randn((total, n + 1, dim), generator=make)[:, 1:]
    for kernel, pooling in ((7, "max"), (5, "avg"), (1, "max")):
        got = score.snapkv_score(q.to(DEVICE), k.to(DEVICE), 0.4, kernel, pooling)
        want = reference.snapkv_score(q, k, 0.4, kernel, pooling)
        assert got.shape == (n, total - window)
        torch.testing.assert_close(got.cpu(), want, atol=1e-6, rtol=1e-5)


def test_warm_up_leaves_nothing_behind() -> None:
    pages = HeadPages.create(4, 2, 3, 2, 16, torch.bfloat16, DEVICE, by_columns=False)
    pages.kernels = operations
    before = [getattr(pages, f.name).clone() for f in fields(pages)[:10]]
    decoder = flashinfer.FlashInferDecoder(pages, [0, 2, 3], 2, spare=3, module=FlashInferModel())
    for scorer in (SnapKV(window=4), Streaming(window=4)):
        with launches() as made:
            assert warm_up(pages, decoder, scorer, (0, 2, 3), group=2) > 0
        after = [getattr(pages, f.name) for f in fields(pages)[:10]]
        assert all(map(torch.equal, before, after))
    scoring = ["_statistics", "_join", "_columns", "_pool"]
    assert [name for name in made.kernels if name in scoring] == []
    assert set(made.kernels) == {
        "_release", "_count_new_pages", "_grow", "_pop", "_lay_out", "_list_tiles", "_list_pages",
        "_append", "_share", "_pick", "_take_pages", "_store_kept",
    }  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the real FlashInfer is checked")
def test_flashinfer_decode_hands_over_a_correct_plan(filled: Callable[..., HeadPages]) -> None:
    """Uneven heads per layer, rows that are not served, padding rows, changing lengths."""
    owned = [[0] * 4, [1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    lens = [[0] * 4, [300, 0, 16, 1], [17, 200, 0, 0], [128, 129, 900, 33]]
    pages = filled(lens, 16, torch.bfloat16, owned=owned, by_columns=False)
    lane_start, group, bs = [0, 1, 4], 3, 4
    decoder = flashinfer.FlashInferDecoder(
        pages, lane_start, group, spare=3, module=FlashInferModel()
    )
    slots = torch.empty((bs, 4), dtype=torch.int64)
    for seed, order in enumerate(([3, 1, 0, 2], [0, 2, 0, 3], [0, 0, 0, 0])):
        rows = torch.tensor(order)
        make = torch.Generator().manual_seed(seed)
        reference.grow(pages, rows, slots)
        fused = torch.randn((bs, 4, 16), generator=make).bfloat16()
        reference.append(pages, slots, fused, fused)
        decoder.plan(rows)
        for layer, (first, end) in enumerate(itertools.pairwise(lane_start)):
            q = torch.randn((bs, (end - first) * group, 17), generator=make).bfloat16()[..., :16]
            out = torch.full(q.shape, torch.nan, dtype=torch.bfloat16)
            want = torch.empty_like(out)
            decoder.decode(q, rows, layer, end - first, 0.25, out)
            reference.decode(pages, q, rows, first, end - first, 0.25, want)
            torch.testing.assert_close(out, want, atol=1e-2, rtol=1e-2)
            assert bool((out[want == 0] == 0).all())


def test_any_batch_size_is_exact(filled: Callable[..., HeadPages]) -> None:
    """One workspace for all sizes: what a larger batch has left behind changes nothing."""
    pages = filled([[0, 0], [300, 1], [17, 200], [1, 640]], 16, torch.bfloat16, by_columns=False)
    decoder = flashinfer.FlashInferDecoder(pages, [0, 2], 2, spare=3, module=FlashInferModel())
    for order in ([3, 1, 2, 0], [2], [1, 3], [0, 0, 0, 1, 2, 3, 0]):
        rows = torch.tensor(order)
        q = torch.randn((len(order), 4, 16)).bfloat16()
        out, want = torch.empty_like(q), torch.empty_like(q)
        decoder.plan(rows)
        decoder.decode(q, rows, 0, 2, 0.25, out)
        reference.decode(pages, q, rows, 0, 2, 0.25, want)
        torch.testing.assert_close(out, want, atol=1e-2, rtol=1e-2)
    assert len(decoder._workspaces) == 2  # larger than there are rows, once
    with pytest.raises(RuntimeError, match="decode of 1 requests, planned were 7"):
        decoder.decode(q[:1], rows[:1], 0, 2, 0.25, out[:1])


def test_tile_lists_follow_flashinfers_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_checks.golden_plan(DEVICE)
    gpu_checks.random_plans(DEVICE, rounds=3)
    monkeypatch.setattr(tiles, "ROWS", 4)  # a layer in several blocks
    gpu_checks.random_plans(DEVICE, rounds=3)


def test_append_folds_the_queries(filled: Callable[..., HeadPages]) -> None:
    pages = filled([[0, 0, 0], [1, 15, 16]], 24, torch.bfloat16, by_columns=False)
    decoder = flashinfer.FlashInferDecoder(pages, [0, 3], 2, spare=3, module="not called")
    fused = torch.randn((2, 12, 24)).bfloat16()
    slots = torch.tensor([[3, -1, 40], [-1, -1, -1]])
    q = fused[:, :6]
    copied = decoder.append(slots, fused[:, 6:9], fused[:, 9:], q)
    assert copied.is_contiguous() and torch.equal(copied, q)
    assert decoder.append(slots, fused[:, 6:9], fused[:, 9:], copied) is copied
    flat = pages.k_pages.view(-1, 24), pages.v_pages.view(-1, 24)
    for lane, slot in ((0, 3), (2, 40)):
        assert torch.equal(flat[0][slot], fused[0, 6 + lane])
        assert torch.equal(flat[1][slot], fused[0, 9 + lane])


@pytest.mark.skipif(DEVICE != "cpu", reason="counts calls of the interpreter")
def test_grow_and_plan_are_six_launches(
    filled: Callable[..., HeadPages], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the batch; and not one operation of torch beside them."""
    pages = filled([[0, 0, 0], [1, 15, 16], [3, 2, 1]], 16, torch.bfloat16, by_columns=False)
    decoder = flashinfer.FlashInferDecoder(pages, [0, 1, 3], 2, spare=3, module="none")
    for order in ([1], [2, 1, 0]):
        rows, slots = torch.tensor(order), torch.empty((len(order), 3), dtype=torch.int64)
        with launches() as made:
            operations.grow(pages, rows, slots)
            decoder.plan(rows)
        assert made.kernels == ["_count_new_pages", "_grow", "_pop", "_lay_out", "_list_tiles",
                                "_list_pages"]  # fmt: skip
        assert made.torch == []

# SPDX-License-Identifier: Apache-2.0
"""Head pages never leak and never alias, whatever the engine does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fairkv_sglang.kernels import PAGE_TOKENS, HeadPages
from fairkv_sglang.kernels.cpu import operations
from fairkv_sglang.kernels.layout import UNLIMITED
from fairkv_tests import reference

ROWS, LANES, MAX_PAGES, DIM, POOL = 5, 3, 16, 8, 90


class Pages(RuleBasedStateMachine):
    """The numba operations beside the reference on a second arena, and a model of the contents.

    `held[row][lane]` is the list of tokens (numbers) that the lane must hold, in order; None where
    the rank does not own the lane.
    """

    @initialize(num_pages=st.integers(6, 40), window=st.integers(0, 40))
    def start(self, num_pages: int, window: int) -> None:
        self.most = [0, window, window]  # of the lanes of two layers
        self.arenas = [
            HeadPages.create(num_pages, ROWS, LANES, MAX_PAGES, DIM, torch.float32, most=self.most)
            for _ in range(2)
        ]
        self.turn: dict[tuple[int, int], int] = {}
        self.held: dict[int, list[list[float] | None]] = {}
        self.token = 0.0

    def new(self, *shape: int) -> torch.Tensor:
        count = int(torch.tensor(shape).prod())
        first, self.token = self.token, self.token + count
        return (
            torch.arange(first, first + count).view(shape)[..., None].repeat(*[1] * len(shape), DIM)
        )

    def both(self, name: str, *arguments: object, results: tuple[torch.Tensor, ...] = ()) -> bool:
        """Run on both arenas; True if both did it, False if both refused and changed nothing."""
        done = []
        for module, arena, result in zip(
            (operations, reference), self.arenas, results or (None, None), strict=True
        ):
            before = [t.clone() for t in (arena.page_table, arena.lens, arena.free_count)]
            extra = () if result is None else (result,)
            try:
                getattr(module, name)(arena, *arguments, *extra)
                done.append(True)
            except RuntimeError:
                now = (arena.page_table, arena.lens, arena.free_count)
                assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
                done.append(False)
        assert done[0] == done[1]
        return done[0]

    @precondition(lambda self: len(self.held) < ROWS - 1)
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        free = [r for r in range(1, ROWS) if r not in self.held]
        row = data.draw(st.sampled_from(free))
        owned = data.draw(st.lists(st.integers(0, 1), min_size=LANES, max_size=LANES))
        room = data.draw(st.sampled_from((UNLIMITED, 0, 2, 5)))
        assert self.both("set_owned", row, torch.tensor(owned, dtype=torch.uint8), room)
        # Two layers: lane 0, and lanes 1 and 2.
        contents: list[list[float] | None] = []
        for lane_lo, n in ((0, 1), (1, 2)):
            most = data.draw(st.integers(1, POOL))
            slots = torch.tensor(data.draw(st.permutations(range(POOL))))[:most]
            m = data.draw(st.integers(0, 3))
            several = st.lists(st.integers(-1, m - 1), min_size=n, max_size=n)
            columns = data.draw(st.none() | several)
            m, columns_or_own = (n, list(range(n))) if columns is None else (m, columns)
            taken = {c for c, mine in zip(columns_or_own, owned[lane_lo:], strict=False) if mine}
            k, v = self.new(POOL, m), self.new(POOL, m)
            # What nobody reads is out of range: positions past a count, counts that no lane takes.
            counts = torch.full((m,), data.draw(st.sampled_from((-40, 10**6))))
            kept = torch.full((m, most), data.draw(st.sampled_from((-1, 10**6))))
            for c in range(m):
                if c in taken:
                    longest = min(most, self.most[lane_lo] or 70)
                    counts[c] = count = data.draw(st.integers(0, longest))
                    chosen = data.draw(st.permutations(range(most)))[:count]
                    kept[c, :count] = torch.tensor(sorted(chosen), dtype=torch.int64)
            arguments = (row, lane_lo, k, v, slots, kept, counts)
            where = None if columns is None else torch.tensor(columns)
            need = sum(
                -(-int(counts[c]) // PAGE_TOKENS)
                for c, mine in zip(columns_or_own, owned[lane_lo : lane_lo + n], strict=True)
                if mine and c >= 0
            )
            done = self.both("store_kept", *arguments, where)
            if done:
                done = need <= room
                room = room - need if done else 0
            for c, mine in zip(columns_or_own, owned[lane_lo : lane_lo + n], strict=True):
                stored = mine and c >= 0 and done
                rows = k[slots[kept[c, : counts[c]]], c, 0].tolist() if stored else []
                contents.append(rows if mine else None)
        self.held[row] = contents

    @precondition(lambda self: self.held)
    @rule(data=st.data(), padding=st.integers(0, 2))
    def step(self, data: st.DataObject, padding: int) -> None:
        some = st.lists(st.sampled_from(sorted(self.held)), unique=True, min_size=1)
        rows = [*data.draw(some), *[0] * padding]
        slots = tuple(torch.full((len(rows), LANES), -7) for _ in range(2))
        if not self.both("grow", torch.tensor(rows), results=slots):
            return
        assert torch.equal(*slots)
        for lane_lo, n in ((0, 1), (1, 2)):
            part = slots[0][:, lane_lo : lane_lo + n]
            k, v = self.new(len(rows), n), self.new(len(rows), n)
            self.both("append", part, k, v)
            for i, row in enumerate(rows):
                for h in range(n):
                    tokens = self.held[row][lane_lo + h] if row else None
                    assert (part[i, h] >= 0) == (tokens is not None)
                    if tokens is not None:
                        self.add(row, lane_lo + h, tokens, float(k[i, h, 0]))

    def add(self, row: int, lane: int, tokens: list[float], new: float) -> None:
        """A lane that is full loses its oldest token."""
        if not self.most[lane] or len(tokens) < self.most[lane]:
            tokens.append(new)
            return
        at = self.turn.get((row, lane), 0)
        tokens[at] = new
        self.turn[row, lane] = (at + 1) % len(tokens)

    @rule(rows=st.lists(st.integers(0, ROWS - 1)))
    def release(self, rows: list[int]) -> None:
        assert self.both("release", torch.tensor(rows, dtype=torch.int64))
        for row in rows:
            self.held.pop(row, None)
            self.turn = {key: at for key, at in self.turn.items() if key[0] != row}

    @invariant()
    def sound(self) -> None:
        used = 0
        for arena in self.arenas:
            arena.check_integrity()
        fast, slow = self.arenas
        for name in ("page_table", "lens", "owned", "free_count", "room", "turn"):
            assert torch.equal(getattr(fast, name), getattr(slow, name)), name
        for row in range(1, ROWS):
            for lane, tokens in enumerate(self.held.get(row, [None] * LANES)):
                k, _ = reference.gather(fast, row, lane)
                assert k[:, 0].tolist() == (tokens or [])
                assert torch.equal(k, reference.gather(slow, row, lane)[0])
                used += -(-len(tokens or []) // PAGE_TOKENS)
        assert fast.num_used == used

    def teardown(self) -> None:
        if hasattr(self, "arenas"):
            self.release(list(range(ROWS)))
            assert all(arena.num_used == 0 for arena in self.arenas)


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


def test_full_arena_is_refused_and_unchanged() -> None:
    pages = HeadPages.create(3, 3, 2, 2, DIM, torch.float32)
    operations.set_owned(pages, 1, torch.ones(2))
    operations.set_owned(pages, 2, torch.ones(2))
    slots = torch.zeros((2, 2), dtype=torch.int64)
    with pytest.raises(RuntimeError, match="no free head page"):
        operations.grow(pages, torch.tensor([1, 2]), slots)
    assert pages.num_used == 0
    assert torch.equal(slots, torch.zeros_like(slots))
    operations.grow(pages, torch.tensor([1]), slots[:1])
    assert pages.num_used == 2
    for _ in range(31):
        operations.release(pages, torch.tensor([2]))
        operations.set_owned(pages, 2, torch.tensor([0, 1]))
        operations.grow(pages, torch.tensor([2]), slots[:1])
    with pytest.raises(RuntimeError, match="no free head page"):
        for _ in range(16):
            operations.grow(pages, torch.tensor([1]), slots[:1])
    pages.check_integrity()


def test_full_row_is_refused() -> None:
    pages = HeadPages.create(40, 2, 1, 17, DIM, torch.float32)
    assert pages.max_pages == 32  # whole runs
    operations.set_owned(pages, 1, torch.ones(1))
    slots = torch.zeros((1, 1), dtype=torch.int64)
    for token in range(32 * PAGE_TOKENS):
        operations.grow(pages, torch.tensor([1]), slots)
        assert int(slots) == token  # page after page, across the border of the run
    with pytest.raises(RuntimeError, match="more pages than its page table"):
        operations.grow(pages, torch.tensor([1]), slots)
    assert pages.num_used == 32
    pages.check_integrity()


def test_bad_arguments_are_refused() -> None:
    pages = HeadPages.create(9, 2, 2, 2, DIM, torch.float32)
    with pytest.raises(ValueError, match="row 0 pads"):
        operations.set_owned(pages, 0, torch.ones(2))
    with pytest.raises(ValueError, match="slots must be"):
        operations.grow(pages, torch.tensor([1]), torch.zeros((1, 3), dtype=torch.int64))
    with pytest.raises(RuntimeError, match="out of range"):
        operations.grow(pages, torch.tensor([2]), torch.zeros((1, 2), dtype=torch.int64))
    with pytest.raises(RuntimeError, match="out of range"):
        operations.release(pages, torch.tensor([-1]))
    operations.set_owned(pages, 1, torch.ones(2))
    pool = torch.zeros((4, 1, DIM))
    good = (torch.arange(4), torch.tensor([[0, 3]]), torch.tensor([2]))
    for at, wrong in (
        (0, torch.tensor([0, 1, 2, 4])),
        (1, torch.tensor([[0, 4]])),
        (2, good[2] + 1),
    ):
        bad = [*good[:at], wrong, *good[at + 1 :]]
        with pytest.raises(RuntimeError, match="out of range"):
            operations.store_kept(pages, 1, 0, pool, pool, *bad)
    with pytest.raises(RuntimeError, match="row, column"):
        operations.store_kept(pages, 1, 0, pool, pool, *good, torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="out of range"):  # more lanes than there are
        operations.store_kept(pages, 1, 0, pool, pool, *good, torch.tensor([0, -1, -1]))
    with pytest.raises(ValueError, match="kept_idx must have 1 rows"):
        operations.store_kept(pages, 1, 0, pool, pool, good[0], good[1].repeat(2, 1), good[2])
    with pytest.raises(ValueError, match="k_pool must be"):
        operations.store_kept(pages, 1, 0, pool.expand(-1, 2, -1), pool, *good)
    assert pages.num_used == 0
    operations.store_kept(pages, 1, 0, pool, pool, *good)
    with pytest.raises(RuntimeError, match="still holds pages"):
        operations.store_kept(pages, 1, 0, pool, pool, *good)
    with pytest.raises(RuntimeError, match="still holds pages"):
        operations.set_owned(pages, 1, torch.ones(2))
    for name in ("num_pages", "rows", "lanes", "max_pages", "head_dim"):
        sizes = {"num_pages": 1, "rows": 1, "lanes": 1, "max_pages": 1, "head_dim": 8, name: 0}
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            HeadPages.create(**sizes, dtype=torch.float32)
    with pytest.raises(ValueError, match="floating-point"):
        HeadPages.create(1, 1, 1, 1, 8, torch.int8)


def test_a_column_needs_pages_once_for_every_lane_that_takes_it() -> None:
    """Lanes 0 and 1 take column 0 (2 pages each); column 1 alone is more than the arena holds."""
    at, pool = torch.arange(90), torch.zeros((90, 2, DIM))
    arguments = (pool, pool, at, at.repeat(2, 1), torch.tensor([20, 90]))
    for num_pages, fits in ((3, False), (4, True)):
        pages = HeadPages.create(num_pages, 2, 3, 4, DIM, torch.float32)
        operations.set_owned(pages, 1, torch.ones(3))
        if not fits:
            with pytest.raises(RuntimeError, match="no free head page"):
                operations.store_kept(pages, 1, 0, *arguments, torch.tensor([0, 0, -1]))
            assert pages.num_used == 0
            continue
        operations.store_kept(pages, 1, 0, *arguments, torch.tensor([0, -1, -1]))
        # A lane that holds pages is in nobody's way as long as it takes no column.
        operations.store_kept(pages, 1, 0, *arguments, torch.tensor([-1, 0, -1]))
        assert pages.lens[1].tolist() == [20, 20, 0]
        pages.check_integrity()


def test_integrity_check_sees_every_damage() -> None:
    def damaged(damage: str) -> HeadPages:
        pages = HeadPages.create(6, 3, 2, 2, DIM, torch.float32)
        operations.set_owned(pages, 1, torch.ones(2))
        operations.grow(pages, torch.tensor([1]), torch.zeros((1, 2), dtype=torch.int64))
        pages.check_integrity()
        exec(damage, {"p": pages})
        return pages

    for damage, message in {
        "p.page_table[1, 0, 0] = p.page_table[1, 1, 0]": "page 0 is lost",
        "p.free_pages[0] = p.page_table[1, 1, 0]": "is lost",
        "p.free_count += 1": "more than one holder",
        "p.free_count += 7": "free count",
        "p.lens[1, 0] = 0": "is lost",
        "p.lens[1, 0] = -1": "negative",
        "p.lens[1, 0] = 257": "more than 16 pages",
        "p.lens[1, 0] = 17": "more than one holder",
        "p.runs[0, 0] = 6": "outside 0..5",
        "p.owned[1, 0] = 0": "does not own",
        "p.owned[0, 0] = 1": "padding row",
        "p.page_table[1, 0, 0] = 6": "outside 0..5",
        "p.error[0] = 1": "no free head page",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            damaged(damage).check_integrity()


def test_store_and_append_from_strided_views_and_any_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pages = HeadPages.create(9, 2, 2, 2, DIM, dtype)
        operations.set_owned(pages, 1, torch.ones(2))
        make = torch.Generator().manual_seed(1)
        pool = torch.randn((2, 40, 6, DIM), generator=make).to(dtype)
        k, v = pool[0, ::2, 1:3], pool[1, 5:25, 3:5]
        slots, kept = torch.randperm(20, generator=make), torch.tensor([[1, 2, 7], [0, 5, -1]])
        operations.store_kept(pages, 1, 0, k, v, slots, kept, torch.tensor([3, 2]))
        wide = torch.empty((1, 5), dtype=torch.int64)
        operations.grow(pages, torch.tensor([1]), wide[:, 1:3])
        operations.append(pages, wide[:, 1:3], pool[0, 30:31, 2:4], pool[1, 30:31, 4:6])
        for lane, (new_k, new_v) in enumerate(((2, 4), (3, 5))):
            got_k, got_v = reference.gather(pages, 1, lane)
            chosen = slots[kept[lane][kept[lane] >= 0]]
            assert torch.equal(got_k, torch.cat([k[chosen, lane], pool[0, 30:31, new_k]]))
            assert torch.equal(got_v, torch.cat([v[chosen, lane], pool[1, 30:31, new_v]]))


def test_store_from_one_column_seen_as_many() -> None:
    """A pool of one head whose view has a head stride of 0, and columns of a larger table."""
    make = torch.Generator().manual_seed(2)
    pool = torch.randn((40, 3, DIM), generator=make)
    k, v = pool[:, 1:2].expand(-1, 3, -1), pool[::1, 2:3].expand(-1, 3, -1)
    slots = torch.randperm(40, generator=make)
    kept, counts = torch.tensor([[1, 2, 7], [0, 5, 99], [3, 4, 6]]), torch.tensor([3, 2, 1])
    pages = HeadPages.create(9, 2, 4, 2, DIM, torch.float32)
    operations.set_owned(pages, 1, torch.ones(4))
    columns = torch.tensor([[2, 8], [1, 8], [-1, 8], [2, 8]])[:, 0]
    operations.store_kept(pages, 1, 0, k, v, slots, kept, counts, columns)
    for lane, positions in enumerate(([3], [0, 5], [], [3])):
        got_k, got_v = reference.gather(pages, 1, lane)
        assert torch.equal(got_k, pool[slots[positions], 1])
        assert torch.equal(got_v, pool[slots[positions], 2])

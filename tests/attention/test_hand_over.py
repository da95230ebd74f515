# SPDX-License-Identifier: Apache-2.0
"""Hand-over alone: any kept sets of any owners arrive, in exact and in larger regions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.attention import hand_over
from fairkv_sglang.attention.endings import Choice, Ending, LayerRows
from fairkv_sglang.attention.forward_spans import PromptSpan
from fairkv_sglang.attention.hand_over import HandOver
from fairkv_sglang.budgets import Kept
from fairkv_sglang.kernels import HeadPages, torch_decode
from fairkv_sglang.parallel import RankHeads
from fairkv_sglang.placement import Plan
from fairkv_tests.compress_cases import source_of
from fairkv_tests.core_cases import QUICK, random_owners, random_plan, seeds, splits
from fairkv_tests.fake_collectives import Collectives, Group, ranks_as_threads

DIM, SLOTS, LAYERS = 8, 200, 3


class Case:
    """Prompts with made-up kept positions: ``kept[prompt][layer][head]``."""

    def __init__(
        self,
        rng: np.random.Generator,
        plan: Plan,
        lengths: list[int],
        most: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.plan, self.lengths = plan, lengths
        heads = plan.num_kv_heads
        make = torch.Generator().manual_seed(int(rng.integers(2**31)))
        self.k, self.v = torch.randn((2, LAYERS, SLOTS, heads, DIM), generator=make).to(dtype)
        self.dtype = dtype
        free = rng.permutation(SLOTS)
        self.slots = [
            torch.from_numpy(free[sum(lengths[:i]) :][:n].copy()) for i, n in enumerate(lengths)
        ]
        self.owners = [random_owners(rng, plan).astype(np.int64) for _ in lengths]
        self.kept = [
            [[self._positions(rng, n, most) for _ in range(heads)] for _ in range(LAYERS)]
            for n in lengths
        ]

    @staticmethod
    def _positions(rng: np.random.Generator, length: int, most: int) -> list[int]:
        count = int(rng.choice([0, 1, rng.integers(0, length + 1), length]))
        return sorted(rng.permutation(length)[: min(count, most)].tolist())

    def choice(self, number: int, layer: int, home: list[int], bounded: bool) -> Choice:
        rows = self.kept[number][layer]
        exact = np.array([len(row) for row in rows])
        counts = torch.from_numpy(exact.copy())
        width = self.lengths[number] if bounded else max(len(rows[h]) for h in home)
        indices = torch.full((len(home), width), -1)
        for i, head in enumerate(home):
            indices[i, : len(rows[head])] = torch.tensor(rows[head], dtype=torch.int64)
        kept = Kept(counts[home], indices)
        return Choice(kept, counts, None if bounded else exact)


class AnyScope:
    """Every head may keep its whole prompt."""

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def most(self, layer: int, prompt_len: int, heads: list[int]) -> int:
        return prompt_len * len(heads)

    def per_head_bound(self, prompt_len: int) -> np.ndarray:
        return np.full((LAYERS, self.heads), prompt_len)


def hand_over_of(
    plan: Plan, rank: int, group: Group | None, dtype: torch.dtype = torch.float32
) -> HandOver:
    heads = RankHeads(plan, rank, 1)
    pages = HeadPages.create(800, 6, heads.num_lanes, 8, DIM, dtype)
    over = HandOver(heads, pages, group)  # type: ignore[arg-type]
    return over


def run(case: Case, bounded: list[bool], at_once: int = 1) -> tuple[list[HandOver], Collectives]:
    """All layers of a pass at whose end every prompt is kept, so many in an exchange."""

    def work(rank: int, group: Group | None) -> HandOver:
        over = hand_over_of(case.plan, rank, group, case.dtype)
        over.overlaps = at_once == 1  # as on CUDA; compress_cases has both
        home = list(over.heads.home)
        endings = []
        for number, owners in enumerate(case.owners):
            row, length = number + 1, case.lengths[number]
            over.pages.kernels.set_owned(
                over.pages, row, torch.from_numpy(over.heads.owned(owners))
            )
            source = over.heads.homes.source
            sources = source[np.arange(len(source))[None], owners]
            span = PromptSpan(row, 0, length, length, length)
            scope = AnyScope(case.plan.num_kv_heads)
            endings.append(Ending(span, case.slots[number], owners, sources, scope))  # type: ignore[arg-type]
        for first in range(0, LAYERS, at_once):
            layers = []
            for layer in range(first, min(first + at_once, LAYERS)):
                choices = [case.choice(i, layer, home, loose) for i, loose in enumerate(bounded)]
                pools = [pool[layer][:, home].clone() for pool in (case.k, case.v)]
                layers.append(LayerRows(layer, endings, choices, *pools))
            over.finish()
            over.start(layers)
            assert over.overlaps or over._arrival is None
            for rows in layers:  # what is packed no longer needs the pool
                rows.k_pool.fill_(torch.nan)
                rows.v_pool.fill_(torch.nan)
        over.finish()
        over.finish()  # nothing is under way
        return over

    return ranks_as_threads(case.plan.tp_size, [hand_over], work)


@settings(QUICK, max_examples=150)
@given(
    seed=seeds,
    split=splits,
    lengths=st.lists(st.sampled_from([1, 2, 15, 16, 17, 40]), min_size=1, max_size=4),
    most=st.sampled_from([0, 1, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_owners_hold_what_is_kept(
    seed: int,
    split: tuple[int, int],
    lengths: list[int],
    most: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    heads, ranks = split
    rng = np.random.default_rng(seed)
    case = Case(rng, random_plan(rng, LAYERS, ranks, heads), lengths, most, dtype)
    bounded = [data.draw(st.booleans()) for _ in lengths]
    at_once = data.draw(st.integers(1, LAYERS))
    overs, collectives = run(case, bounded, at_once)
    rows = [0] * ranks
    for number, owners in enumerate(case.owners):
        for rank, over in enumerate(overs):
            for lane, (layer, head) in enumerate(
                zip(over.heads.lane_layer, over.heads.lane_head, strict=True)
            ):
                k, v = torch_decode.gather(over.pages, number + 1, lane)
                if owners[layer, head] != rank:
                    assert len(k) == 0
                    continue
                slots = case.slots[number][case.kept[number][layer][head]]
                assert torch.equal(k, case.k[layer, slots, head])
                assert torch.equal(v, case.v[layer, slots, head])
                source = source_of(over.heads.homes, head, rank)
                if source != rank:
                    known = len(case.kept[number][layer][head])
                    rows[source] += lengths[number] if bounded[number] else known
    for rank, over in enumerate(overs):
        over.pages.check_integrity()
        assert over.rows_sent == rows[rank]
        assert collectives.bytes_sent[rank] == rows[rank] * over.row_bytes
    assert collectives.count("all_gather") == 0
    assert collectives.count("all_to_all") <= -(-LAYERS // at_once)


@pytest.mark.parametrize("bounded", [False, True], ids=["exact", "bounded"])
def test_heads_that_keep_nothing_leave_no_gap(bounded: bool) -> None:
    """Three heads travel together; the first, or the one in the middle, has no row."""
    shares = np.zeros((LAYERS, 2, 6))
    shares[:, 0, 3:], shares[:, 1, :3] = 1, 1
    case = Case(np.random.default_rng(0), Plan.from_shares(shares, "swap"), [20], 20)
    full, some = list(range(20)), [0, 3, 19]
    for layer in range(LAYERS):
        case.kept[0][layer] = [[], full, some, full, [], some] if layer else [full, [], []] * 2
    overs, collectives = run(case, [bounded])
    assert collectives.count("all_to_all") == LAYERS
    for rank, over in enumerate(overs):
        assert over.rows_sent == (LAYERS * 60 if bounded else 20 + (LAYERS - 1) * 23)
        for lane, head in enumerate(over.heads.lane_head.tolist()):
            positions = case.kept[0][lane // 3][head]
            k, v = torch_decode.gather(over.pages, 1, lane)
            assert torch.equal(k, case.k[lane // 3, case.slots[0][positions], head]), (rank, lane)
            assert torch.equal(v, case.v[lane // 3, case.slots[0][positions], head])


def test_finish_without_start() -> None:
    over = hand_over_of(Plan.from_shares(np.ones((LAYERS, 1, 2)), "one"), 0, None)
    over.finish()
    assert over.rows_sent == 0 and over.pages.num_used == 0


def test_bytes_of_a_row_are_those_of_the_pages() -> None:
    plan = Plan.from_shares(np.ones((LAYERS, 1, 2)), "one")
    for dtype in (torch.float32, torch.bfloat16):
        pages = HeadPages.create(4, 2, 4, 2, DIM, dtype)
        over = HandOver(RankHeads(plan, 0, 1), pages, None)
        assert over.row_bytes * 16 == pages.page_bytes


def test_a_move_needs_an_owner_away_from_home() -> None:
    shares = np.full((LAYERS, 4, 2), 0.25)  # each head has two homes, ranks 0, 1 and 2, 3
    over = hand_over_of(Plan.from_shares(shares, "all"), 0, (0, 4))
    source = over.heads.homes.source

    def ending(layers: list[list[int]]) -> Ending:
        owners = np.array(layers)
        sources = source[np.arange(2)[None], owners]
        return Ending(SimpleNamespace(), torch.empty(0), owners, sources, AnyScope(2))  # type: ignore[arg-type]

    at_home = ending([[0, 2], [1, 3]])
    away = ending([[1, 3], [2, 2]])

    def moves(layer: int, endings: list[Ending]) -> bool:
        return over.moves(LayerRows(layer, endings, [], torch.empty(0), torch.empty(0)))

    assert [moves(layer, [at_home]) for layer in (0, 1)] == [False, False]
    assert [moves(layer, [at_home, away]) for layer in (0, 1)] == [False, True]
    assert not moves(0, [])


def test_rows_that_move_must_have_a_number() -> None:
    """Scope rank: without the exchange of counts a receiver cannot know where a lane's rows end."""
    shares = np.zeros((LAYERS, 2, 2))
    shares[:, 0, 1], shares[:, 1, 0] = 1, 1
    case = Case(np.random.default_rng(0), Plan.from_shares(shares, "swap"), [20], 20)
    unknown = case.choice(0, 0, [0], bounded=True)
    unknown.counts = None
    case.choice = lambda *args: unknown  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="rows move whose number nobody knows"):
        run(case, [True])

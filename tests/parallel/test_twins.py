# SPDX-License-Identifier: Apache-2.0
"""Decode twins: for any plan they have exactly the weights of this rank's lanes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.parallel import LaneChanges, LaneTable, RankHeads, TwinWeights, twins
from fairkv_sglang.parallel.twins import TWIN
from fairkv_sglang.placement import Plan
from fairkv_sglang.placement.homes import Homes
from fairkv_tests.attention_module import (
    DIM,
    HIDDEN,
    Attention,
    Reference,
    attention,
    class_of,
    pairs,
    weights_of,
)
from fairkv_tests.core_cases import QUICK, random_owners, random_plan, seeds
from fairkv_tests.fake_collectives import Collectives, Group, ranks_as_threads

LAYERS = 2
# KV heads, query heads of each, ranks.
SPLITS = [(4, 2, 1), (4, 2, 2), (4, 1, 4), (6, 3, 3), (2, 2, 4), (1, 4, 4), (2, 4, 4), (1, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


class Case:
    """A model of attention layers on several ranks."""

    def __init__(
        self,
        plan: Plan,
        group: int,
        *,
        bias: bool = False,
        out_bias: bool = False,
        q_norm: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        slots: int | None = None,
        fixed_width: bool = False,
    ) -> None:
        self.fixed_width = fixed_width
        self.heads = [
            RankHeads(plan, rank, group, LaneTable(plan, slots)) for rank in range(plan.tp_size)
        ]
        self.plan, self.group, self.dtype = plan, group, dtype
        self.kind = class_of(plan.tp_size)
        self.options = {"bias": bias, "out_bias": out_bias, "q_norm": q_norm}
        self.references = [self.reference(seed + layer) for layer in range(plan.num_layers)]
        self.built: list[TwinWeights | None] = [None] * plan.tp_size
        self.modules = [self._build(rank) for rank in range(plan.tp_size)]

    def reference(self, seed: int) -> Reference:
        bias, out_bias = self.options["bias"], self.options["out_bias"]
        return Reference(self.plan.num_kv_heads, self.group, bias, out_bias, seed, self.dtype)

    def _build(self, rank: int) -> list[Attention]:
        heads = self.plan.num_kv_heads
        made = []
        for layer in range(self.plan.num_layers):
            module = self.kind(
                layer_id=layer, num_heads=heads * self.group, num_kv_heads=heads, **self.options
            ).to(self.dtype)
            self.references[layer].load(module, rank)
            made.append(module)
        return made

    def run(self, name: str, *arguments: Any) -> Collectives:
        """``build``, ``refresh``, ``bring`` or ``settle`` on all ranks."""

        def work(rank: int, group: Group | None) -> None:
            if self.built[rank] is None:
                self.built[rank] = TwinWeights(
                    self.modules[rank],
                    self.heads[rank],
                    DIM,
                    group,  # type: ignore[arg-type]
                    fixed_width=self.fixed_width,
                )
            getattr(self.built[rank], name)(*arguments)

        return ranks_as_threads(self.plan.tp_size, [twins], work)[1]

    def check_slots(self) -> None:
        """Every slot that holds a head, in modules whose width may follow the slots in use."""
        for rank in range(self.plan.tp_size):
            self.check_slots_of(rank)

    def check_slots_of(self, rank: int) -> None:
        """The same of one rank."""
        heads, modules = self.heads[rank], self.modules[rank]
        for layer, module in enumerate(modules):
            twin, slots = getattr(module, TWIN), heads.slots(layer)
            width = twin.attn.tp_k_head_num
            assert (twin is module) == (heads.serves_home(layer) and not self.fixed_width)
            used = heads.table.width(layer, heads.rank)
            assert width == (len(slots) if self.fixed_width else used)
            for slot in np.flatnonzero(slots >= 0).tolist():
                want = self.references[layer].state([int(slots[slot])])
                for found, wanted in zip(
                    lane_of(weights_of(twin), slot, width, self.group),
                    lane_of(want, 0, 1, self.group),
                    strict=True,
                ):
                    assert torch.equal(found, wanted), (heads.rank, layer, slot)

    def close_gaps(self) -> None:
        """As the re-planner does when a plan's lanes are in place."""
        for heads, built in zip(self.heads, self.built, strict=True):
            for layer in range(self.plan.num_layers):
                for rank in range(self.plan.tp_size):
                    while (slots := heads.table.close_gap(layer, rank)) is not None:
                        if rank == heads.rank:
                            built.shift(layer, *slots)
                            self.check_slots_of(heads.rank)
                    used = heads.table.capacity[layer, rank] - heads.table.free(layer, rank)
                    assert heads.table.width(layer, rank) == max(used, 1)
        assert all((h.table.head == self.heads[0].table.head).all() for h in self.heads)
        self.check_slots()

    def check(self) -> None:
        """Every twin against slices of the full weights."""
        for rank, modules in enumerate(self.modules):
            for layer, module in enumerate(modules):
                twin, lanes = getattr(module, TWIN), list(self.plan.heads(layer, rank))
                home = RankHeads(self.plan, rank, self.group).serves_home(layer)
                assert (twin is module) == home
                for found, want in pairs(twin, self.references[layer].state(lanes)):
                    assert (found is None) == (want is None)
                    assert found is None or torch.equal(found, want), (rank, layer)
                    assert found is None or (found.dtype, found.device) == (want.dtype, want.device)
                assert twin.attn.tp_k_head_num == len(lanes)
                assert twin.attn.tp_q_head_num == len(lanes) * self.group
                assert twin.attn.layer_id == layer


@settings(QUICK, max_examples=80)
@given(
    seed=seeds,
    split=st.sampled_from(SPLITS),
    bias=st.booleans(),
    out_bias=st.booleans(),
    q_norm=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_twins_have_the_weights_of_their_lanes(
    seed: int,
    split: tuple[int, int, int],
    bias: bool,
    out_bias: bool,
    q_norm: bool,
    dtype: torch.dtype,
) -> None:
    heads, group, ranks = split
    plan = random_plan(np.random.default_rng(seed), LAYERS, ranks, heads)
    case = Case(
        plan, group, bias=bias, out_bias=out_bias, q_norm=q_norm, seed=seed % 99, dtype=dtype
    )
    collectives = case.run("build")
    case.check()
    assert collectives.count("all_gather") == 0
    # New weights at home, in place, as an update of weights loads them.
    for layer in range(LAYERS):
        case.references[layer] = case.reference(1000 + layer)
        for rank, modules in enumerate(case.modules):
            case.references[layer].load(modules[layer], rank)
    before = [getattr(m, TWIN).qkv_proj.weight.data_ptr() for row in case.modules for m in row]
    case.run("refresh")
    case.check()
    after = [getattr(m, TWIN).qkv_proj.weight.data_ptr() for row in case.modules for m in row]
    assert before == after, "captured graphs read the old weights"


@settings(QUICK, max_examples=40)
@given(
    seed=seeds,
    split=st.sampled_from([s for s in SPLITS if s[2] > 1]),
    bias=st.booleans(),
    fixed_width=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_slots_follow_new_plans(
    seed: int, split: tuple[int, int, int], bias: bool, fixed_width: bool, dtype: torch.dtype
) -> None:
    """Piece by piece from plan to plan: each slot always has the weights of its head, memory
    stays where it is, and an update of weights in between reaches every slot.
    """
    heads, group, ranks = split
    rng = np.random.default_rng(seed)
    plans = [random_plan(rng, LAYERS, ranks, heads) for _ in range(3)]
    slots = min(heads, max(len(row) for p in plans for layer in p.layers for row in layer))
    slots = max(slots, 1 + heads // ranks)
    case = Case(
        plans[0], group, bias=bias, seed=5, dtype=dtype, slots=slots, fixed_width=fixed_width
    )
    case.run("build")
    case.check_slots()
    memory = [
        b._twins[layer][slots].qkv_proj.weight.data_ptr() for b in case.built for layer in (0, 1)
    ]
    changes = [LaneChanges(heads.table) for heads in case.heads]
    nobody = np.zeros((LAYERS, ranks, heads), dtype=np.int64)
    for plan in plans[1:]:
        for change in changes:
            change.set_aim(plan.shares() > 0)
        for _ in range(40 * heads * ranks):
            if not changes[0].pending:
                break
            gone = [change.release(nobody) for change in changes]
            moves = [change.next_moves(2) for change in changes]
            assert all(m == moves[0] for m in moves) and all(g == gone[0] for g in gone)
            if moves[0]:
                case.run("bring", moves[0])
            if gone[0]:
                case.run("settle")
            for change, came in zip(changes, moves, strict=True):
                change.arrived(came)
            case.check_slots()
            if rng.random() < 0.1:
                layer = int(rng.integers(LAYERS))
                case.references[layer] = case.reference(int(rng.integers(1000)))
                for rank, modules in enumerate(case.modules):
                    case.references[layer].load(modules[layer], rank)
                case.run("refresh")
                case.check_slots()
        assert not changes[0].pending
        if not fixed_width:
            case.close_gaps()
    assert memory == [
        b._twins[layer][slots].qkv_proj.weight.data_ptr() for b in case.built for layer in (0, 1)
    ]


def test_the_last_home_head_comes_back() -> None:
    """A narrow twin makes room although decode goes back to SGLang's module."""
    shares = home_shares(4, 2)[:1]
    case = Case(Plan.from_shares(np.repeat(shares, LAYERS, axis=0), "home"), 2, slots=3)
    case.run("build")
    away = np.repeat(np.array([[[1, 0, 0, 0], [0, 1, 1, 1]]], dtype=float), LAYERS, axis=0)
    changes = [LaneChanges(heads.table) for heads in case.heads]
    nobody = np.zeros((LAYERS, 2, 4), dtype=np.int64)
    for aim in (away > 0, np.repeat(shares, LAYERS, axis=0) > 0):
        for change in changes:
            change.set_aim(aim)
        while changes[0].pending:
            gone = [change.release(nobody) for change in changes]
            moves = [change.next_moves(1) for change in changes]
            if moves[0]:
                case.run("bring", moves[0])
            for change, came in zip(changes, moves, strict=True):
                change.arrived(came)
            if gone[0]:
                case.run("settle")
            case.check_slots()
            case.run("refresh")
            case.check_slots()


def lane_of(weights: Any, lane: int, count: int, group: int) -> list[torch.Tensor]:
    """q, k and v rows (and biases) and o columns of one of ``count`` lanes."""
    sizes = [count * group * DIM, count * DIM, count * DIM]
    parts = [
        part.view(count, -1, *part.shape[1:])[lane]
        for whole in (weights.qkv, weights.bias)
        if whole is not None
        for part in whole.split(sizes)
    ]
    return [*parts, weights.o.view(HIDDEN, count, -1)[:, lane]]


@settings(QUICK, max_examples=40)
@given(seed=seeds, split=st.sampled_from(SPLITS), bias=st.booleans())
def test_sum_over_ranks_is_the_unsplit_layer(
    seed: int, split: tuple[int, int, int], bias: bool
) -> None:
    """Each rank's twin, with the heads of others switched off: what an all-reduce adds up."""
    heads, group, ranks = split
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, LAYERS, ranks, heads)
    owners = random_owners(rng, plan)
    case = Case(plan, group, bias=bias, seed=3, dtype=torch.float64)
    case.run("build")
    x = torch.randn(9, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for layer in range(LAYERS):
        total = torch.zeros(9, HIDDEN, dtype=torch.float64)
        for rank, modules in enumerate(case.modules):
            mine = RankHeads(plan, rank, group)
            lanes = slice(mine.lane_start[layer], mine.lane_start[layer + 1])
            weights = weights_of(getattr(modules[layer], TWIN))
            total += attention(x, weights, group, mine.owned(owners)[lanes])
        whole = case.references[layer].state(list(range(heads)))
        torch.testing.assert_close(total, attention(x, whole, group, np.ones(heads)))


def home_shares(heads: int, ranks: int) -> np.ndarray:
    homes = Homes(heads, ranks)
    return np.repeat((homes.at_home / homes.replicas)[None], LAYERS, axis=0)


def test_lanes_at_home_need_no_twin() -> None:
    case = Case(Plan.from_shares(home_shares(4, 2), "contiguous"), 2)
    collectives = case.run("build")
    assert not any(collectives.calls)
    for built in case.built:
        assert built is not None and built.bytes == 0
        assert all(getattr(module, TWIN) is module for module in built.modules)
        assert "0.0 MiB of weights in 0 of 2 layers" in built.describe()
    assert not any(case.run("refresh").calls)


def test_a_rank_at_home_sends_to_one_that_is_not() -> None:
    """Rank 0 serves a copy of rank 1's head in one layer; rank 1 needs nothing itself."""
    shares = home_shares(4, 2)
    shares[1, 0, 2] = shares[1, 1, 2] = 0.5
    case = Case(Plan.from_shares(shares, "copy"), 2)
    collectives = case.run("build")
    case.check()
    assert collectives.count("all_to_all") == 1
    numbers = 2 * (2 * DIM * HIDDEN) + 2 * DIM * HIDDEN  # q and o of two query heads, k, v
    assert collectives.bytes_sent == [0, 4 * numbers]
    first, second = case.built
    assert first is not None and second is not None
    assert first.bytes == 3 * 4 * numbers and second.bytes == 0
    assert first.describe().startswith("decode twins of rank 0: 0.0 MiB of weights in 1 of 2")


def test_bytes_are_the_parameters_of_the_twins() -> None:
    rng = np.random.default_rng(7)
    plan = random_plan(rng, LAYERS, 4, 4)
    case = Case(plan, 2, bias=True, out_bias=True, dtype=torch.bfloat16)
    case.run("build")
    for rank, built in enumerate(case.built):
        lanes = [
            len(plan.heads(layer, rank))
            for layer in range(LAYERS)
            if not RankHeads(plan, rank, 2).serves_home(layer)
        ]
        each = (2 * 2 + 2) * DIM * HIDDEN + (2 + 2) * DIM  # weights of a lane, biases of q, k, v
        assert built is not None
        assert built.bytes == 2 * (sum(lanes) * each + len(lanes) * HIDDEN)


def test_sglang_does_not_see_twins() -> None:
    """Loading, updating and listing of weights must go on as if there were none."""
    swapped = Plan.from_shares(home_shares(4, 2)[:, ::-1].copy(), "swapped")
    case = Case(swapped, 2, bias=True, q_norm=True)
    model = torch.nn.ModuleList(case.modules[0])
    before = (
        dict(model.named_parameters()),
        list(model.named_modules()),
        list(model.state_dict()),
    )
    case.run("build")
    after = (dict(model.named_parameters()), list(model.named_modules()), list(model.state_dict()))
    assert before[0].keys() == after[0].keys() and before[1:] == after[1:]
    assert all(before[0][name] is parameter for name, parameter in after[0].items())
    twin = getattr(case.modules[0][0], TWIN)
    assert twin is not case.modules[0][0] and twin not in list(model.modules())
    assert getattr(twin, TWIN, None) is None


def test_what_has_no_heads_is_shared() -> None:
    swapped = Plan.from_shares(home_shares(4, 2)[:, ::-1].copy(), "swapped")
    case = Case(swapped, 2, q_norm=True)
    case.run("build")
    for module in case.modules[0]:
        twin = getattr(module, TWIN)
        for name in ("q_norm", "k_norm", "rotary_emb"):
            assert getattr(twin, name) is getattr(module, name)
        for name in ("qkv_proj", "o_proj", "attn"):
            assert getattr(twin, name) is not getattr(module, name)
        assert type(twin) is type(module)


@pytest.mark.parametrize(("heads", "group", "ranks"), [(4, 2, 2), (2, 4, 4)])
def test_attention_sinks_go_with_their_heads(heads: int, group: int, ranks: int) -> None:
    """Each query head's is its number; bfloat16, as in SGLang, beside other weights in float32."""
    plan = random_plan(np.random.default_rng(7), LAYERS, ranks, heads)
    case = Case(plan, group)
    homes = Homes(heads, ranks)
    part = group // homes.replicas
    for rank, modules in enumerate(case.modules):
        numbers = [
            head * group + homes.ranks(head).index(rank) * part + query
            for head in homes.heads(rank)
            for query in range(part)
        ]
        for module in modules:
            sinks = torch.tensor(numbers, dtype=torch.bfloat16)
            module.sinks = torch.nn.Parameter(sinks, requires_grad=False)
    case.run("build")
    case.check_slots()
    for rank, modules in enumerate(case.modules):
        for layer, module in enumerate(modules):
            wanted = [h * group + query for h in plan.heads(layer, rank) for query in range(group)]
            assert getattr(module, TWIN).sinks.tolist() == wanted


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_counts_that_sglang_did_not_build_are_refused(ranks: int) -> None:
    plan = random_plan(np.random.default_rng(1), LAYERS, ranks, 2 if ranks == 4 else 4)
    case = Case(plan, 2)
    heads = max(1, plan.num_kv_heads // ranks)
    queries = plan.num_kv_heads * 2 // ranks
    for modules in case.modules:
        for module in modules:
            module.attn.tp_k_head_num += 1
    says = rf"was built with .*\({heads + 1}, {queries}, 4\), expected \({heads}, {queries}, 4\)"
    with pytest.raises(RuntimeError, match=says):
        case.run("build")


def test_a_head_size_that_is_not_the_models_is_refused() -> None:
    swapped = Plan.from_shares(home_shares(4, 1)[:, :, ::-1].copy(), "one")
    permuted = random_plan(np.random.default_rng(1), LAYERS, 1, 4, copies=False)
    assert swapped.heads(0, 0) == (0, 1, 2, 3)
    case = Case(permuted, 2)
    for module in case.modules[0]:
        module.head_dim = 2 * DIM
    with pytest.raises(RuntimeError, match=r"head size.*\(4, 8, 8\), expected \(4, 8, 4\)"):
        case.run("build")

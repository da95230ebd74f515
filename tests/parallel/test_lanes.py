# SPDX-License-Identifier: Apache-2.0
"""Lane slots: from any plan to any other, whatever residents there are, in steps that never leave
a head without an open lane.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.parallel import LaneChanges, LaneTable, Move
from fairkv_sglang.placement import Plan

SPLITS = [(8, 2), (8, 4), (8, 8), (4, 2), (2, 4), (3, 3), (6, 3), (5, 2), (16, 4)]


def lanes_of(rng: np.random.Generator, ranks: int, heads: int, slots: int) -> np.ndarray:
    """Any lanes ``[R, H]`` within the slots: every head somewhere, every rank with one."""
    while True:
        served = np.zeros((ranks, heads), dtype=bool)
        places = rng.permutation(np.repeat(np.arange(ranks), slots))[:heads]
        served[places, rng.permutation(heads)] = True
        for _ in range(int(rng.integers(0, ranks * slots + 1))):
            rank = int(rng.integers(ranks))
            if served[rank].sum() < slots:
                served[rank, int(rng.integers(heads))] = True
        if served.any(axis=0).all() and served.any(axis=1).all():
            return served


def full_lanes_of(rng: np.random.Generator, ranks: int, heads: int, slots: int) -> np.ndarray:
    """Lanes that leave no slot free; some ranks hold heads that nobody else holds."""
    while True:
        served = np.zeros((ranks, heads), dtype=bool)
        order = rng.permutation(heads).tolist()
        lonely = int(rng.integers(0, min(ranks - 1, heads // slots) + 1))
        for rank in range(lonely):
            served[rank, [order.pop() for _ in range(slots)]] = True
        for rank in range(lonely, ranks):
            if len(order) < slots:
                return lanes_of(rng, ranks, heads, slots)
            served[rank, rng.choice(order, slots, replace=False)] = True
        if served.any(axis=0).all():
            return served


def plan_of(served: np.ndarray) -> Plan:
    """``[L, R, H]`` lanes with equal shares."""
    return Plan.from_shares(served / served.sum(axis=1, keepdims=True), "any")


class Traffic:
    """Requests that take open lanes and leave again, and a check of every step."""

    def __init__(self, changes: LaneChanges, rng: np.random.Generator) -> None:
        self.changes, self.rng = changes, rng
        self.count = np.zeros(changes.open.shape, dtype=np.int64)
        self.requests: list[np.ndarray] = []
        self.held: dict[tuple[int, int], np.ndarray] = {}

    def admit(self) -> None:
        """A request owns one open lane of each head."""
        noise = self.rng.random(self.changes.open.shape) * self.changes.open
        lanes = noise == noise.max(axis=1, keepdims=True)
        self.requests.append(lanes)
        self.count += lanes

    def leave(self) -> None:
        if self.requests:
            self.count -= self.requests.pop(int(self.rng.integers(len(self.requests))))

    def step(self, most: int) -> list[Move]:
        """One step of the transition, as the engine takes it."""
        changes, table = self.changes, self.changes.table
        before = table.head.copy()
        changes.release(self.count)
        moves = changes.next_moves(most)
        assert len(moves) <= most
        for layer, rank, head in moves:
            assert not changes.open[layer, rank, head]
            assert table.slot(layer, rank, head) < table.capacity[layer, rank]
        changes.arrived(moves)
        served = table.served()
        assert (served | ~changes.open).all(), "an open lane has no weights"
        assert changes.open.any(axis=1).all(), "a head has no open lane"
        assert (served | (self.count == 0)).all(), "a lane with residents lost its slot"
        # Where there are residents the slot stays the same: page tables are by slot.
        slots = np.argwhere(before >= 0)
        for layer, rank, slot in slots.tolist():
            head = before[layer, rank, slot]
            if self.count[layer, rank, head]:
                assert table.head[layer, rank, slot] == head
        return moves


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    split=st.sampled_from(SPLITS),
    spare=st.integers(1, 3),
    layers=st.integers(1, 3),
    most=st.integers(1, 5),
    full=st.booleans(),
)
def test_any_plan_follows_any_other(seed, split, spare, layers, most, full):
    heads, ranks = split
    rng = np.random.default_rng(seed)
    slots = min(max(1, -(-heads // ranks)) + spare, heads)
    if ranks * slots <= heads:
        return

    lanes = full_lanes_of if full else lanes_of

    def draw() -> np.ndarray:
        return np.stack([lanes(rng, ranks, heads, slots) for _ in range(layers)])

    table = LaneTable(plan_of(draw()), slots)
    traffic = Traffic(LaneChanges(table), rng)
    for _ in range(int(rng.integers(0, 6))):
        traffic.admit()
    for _ in range(3):  # the second and the third aim come while the first is under way
        aim = draw()
        traffic.changes.set_aim(aim)
        for _ in range(int(rng.integers(0, 4))):
            traffic.step(most)
            traffic.admit()
            traffic.leave()
    for _ in range(40 * layers * ranks * heads):
        if not traffic.changes.pending:
            break
        traffic.step(most)
        traffic.admit()  # load never ends, but every request does
        traffic.leave()
        traffic.leave()
    assert not traffic.changes.pending
    assert (table.served() == aim).all() and (traffic.changes.open == aim).all()


def test_an_unchanged_aim_moves_nothing():
    served = np.array([[[1, 1, 0, 0], [0, 0, 1, 1]]], dtype=bool)
    table = LaneTable(plan_of(served), 3)
    changes = LaneChanges(table)
    changes.set_aim(served)
    assert not changes.pending and changes.next_moves(9) == [] and table.version == 0


def test_two_heads_change_places_through_the_spare_slots():
    table = LaneTable(plan_of(np.array([[[1, 1, 0, 0], [0, 0, 1, 1]]], dtype=bool)), 3)
    changes = LaneChanges(table)
    changes.set_aim(np.array([[[1, 0, 1, 0], [0, 1, 0, 1]]], dtype=bool))
    moves = changes.next_moves(9)
    assert moves == [Move(0, 0, 2), Move(0, 1, 1)]
    changes.arrived(moves)
    assert changes.open[0].tolist() == [[True, False, True, False], [False, True, False, True]]
    residents = np.zeros((1, 2, 4), dtype=np.int64)
    residents[0, 0, 1] = 1  # a request still has its pages there
    assert changes.release(residents) and changes.pending
    assert table.head[0].tolist() == [[0, 1, 2], [-1, 3, 1]]
    residents[0, 0, 1] = 0
    assert changes.release(residents) and not changes.pending
    assert table.width(0, 0) == 3 and table.free(0, 0) == 1


def test_ranks_that_hold_copies_alone_make_room_for_a_swap():
    """All slots full: ranks 0 and 1 swap a head, and only the others have what can be spared."""
    before = np.zeros((1, 8, 8), dtype=bool)
    before[0, 0, [0, 1]] = before[0, 1, [2, 3]] = True
    for rank in range(2, 8):
        before[0, rank, [4 + rank % 4, 4 + (rank + 1) % 4]] = True
    after = before.copy()
    after[0, 0] = after[0, 1] = False
    after[0, 0, [0, 2]] = after[0, 1, [1, 3]] = True
    changes = LaneChanges(LaneTable(plan_of(before), 2))
    changes.set_aim(after)
    nobody = np.zeros(before.shape, dtype=np.int64)
    moved = 0
    for _ in range(20):
        changes.release(nobody)
        moves = changes.next_moves(9)
        changes.arrived(moves)
        moved += len(moves)
    assert not changes.pending and moved <= 6


def test_what_does_not_fit_is_refused():
    table = LaneTable(plan_of(np.array([[[1, 1], [0, 1]]], dtype=bool)), 2)
    changes = LaneChanges(table)
    with pytest.raises(ValueError, match="without a lane"):
        changes.set_aim(np.array([[[1, 0], [1, 0]]], dtype=bool))
    small = LaneChanges(LaneTable(plan_of(np.array([[[1, 0], [0, 1]]], dtype=bool)), 1))
    with pytest.raises(ValueError, match="more lanes on a rank than there are slots"):
        small.set_aim(np.array([[[1, 1], [0, 1]]], dtype=bool))
    with pytest.raises(ValueError):
        small.table.put(0, 0, 1)


def test_without_slots_the_table_is_the_plan():
    plan = plan_of(np.array([[[1, 1, 1], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]], dtype=bool))
    table = LaneTable(plan)
    assert table.fixed and table.capacity.tolist() == [[3, 1], [1, 2]]
    assert table.head[1, 1].tolist() == [1, 2, -1]
    assert (table.served() == (plan.shares() > 0)).all()

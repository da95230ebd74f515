# SPDX-License-Identifier: Apache-2.0
"""Lane slots: which head each slot of a rank holds, and the way from one plan to the next.

Like the physical expert slots of an expert-parallel load balancer: the number of slots of each
(layer, rank) is fixed when the server starts, so shapes, page tables and CUDA graphs stay as they
are; a new plan changes contents only. Every rank keeps the table of all ranks and takes the same
steps, from numbers that are equal on all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.placement import Plan

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
EMPTY = -1


class LaneTable:
    """The head in each slot of every rank.

    Args:
        plan: Its lanes fill the first slots, in the plan's order.
        slots: Slots of each (layer, rank), at least; None: exactly those that the plan fills.
    """

    def __init__(self, plan: Plan, slots: int | None = None) -> None:
        self.num_heads = plan.num_kv_heads
        counts = np.array([[len(row) for row in layer] for layer in plan.layers], dtype=np.int64)
        self.capacity: IntArray = counts if slots is None else np.maximum(counts, slots)  # [L, R]
        self.fixed = slots is None
        shape = (*counts.shape, int(self.capacity.max()))
        self.head: IntArray = np.full(shape, EMPTY, dtype=np.int64)  # [L, R, slots]
        for layer, ranks in enumerate(plan.layers):
            for rank in range(len(ranks)):
                self.head[layer, rank, : counts[layer, rank]] = plan.heads(layer, rank)
        self.version = 0

    def served(self) -> BoolArray:
        """``[L, R, H]``: whether the rank holds the head."""
        return np.asarray((self.head[..., None] == np.arange(self.num_heads)).any(axis=2))

    def slot(self, layer: int, rank: int, head: int) -> int:
        """The slot that holds the head. Raises ValueError if none does."""
        return self.head[layer, rank].tolist().index(head)

    def free(self, layer: int, rank: int) -> int:
        """Slots that hold no head."""
        return int(self.capacity[layer, rank] - (self.head[layer, rank] != EMPTY).sum())

    def width(self, layer: int, rank: int) -> int:
        """Slots up to the last that holds a head, at least one."""
        used = np.flatnonzero(self.head[layer, rank] != EMPTY)
        return int(used[-1]) + 1 if len(used) else 1

    def put(self, layer: int, rank: int, head: int) -> int:
        """Give the head the first free slot. Raises ValueError if there is none."""
        slot = self.head[layer, rank].tolist().index(EMPTY)
        if slot >= self.capacity[layer, rank]:
            raise ValueError(f"layer {layer}: rank {rank} has no free slot for head {head}")
        self.head[layer, rank, slot] = head
        self.version += 1
        return slot

    def take(self, layer: int, rank: int, head: int) -> None:
        """Empty the head's slot."""
        self.head[layer, rank, self.slot(layer, rank, head)] = EMPTY
        self.version += 1

    def close_gap(self, layer: int, rank: int) -> tuple[int, int] | None:
        """Bring the head of the last slot in use to an empty one before it.

        Returns:
            The slot that it left and the one that it has now; None where no slot before the last
            one in use is empty.
        """
        row = self.head[layer, rank, : self.width(layer, rank)]
        empty = np.flatnonzero(row == EMPTY)
        if not len(empty) or len(row) == 1:
            return None
        last, first = len(row) - 1, int(empty[0])
        row[first], row[last] = row[last], EMPTY
        self.version += 1
        return last, first


class Move(NamedTuple):
    """A head whose weights a rank needs."""

    layer: int
    rank: int
    head: int


class LaneChanges:
    """The way from the lanes that there are to those of a plan, in small steps.

    A lane is *open* while new requests may be routed to it. A lane that the plan does not want is
    closed as soon as its head has another open one, and gives its slot back when its last resident
    has left; a lane that the plan wants takes a free slot, gets its weights, and opens. Every
    head has an open lane at any time. The aim may change at any time.

    Where ranks wait for each other's slots and nothing drains, a copy that another lane can stand
    in for is closed for a while, or a head is brought to a free slot elsewhere. With more slots
    than heads in the layer there is one or the other.
    """

    def __init__(self, table: LaneTable) -> None:
        self.table = table
        self.open: BoolArray = table.served()  # [L, R, H]
        self.aim: BoolArray = self.open.copy()
        # Of each layer: a head under way to a rank that the plan does not want it on, and lanes
        # that were closed to make room.
        self._detour: dict[int, Move] = {}
        self._lent: set[Move] = set()
        self.pending = False
        """Whether any lane is still to come or to go; asked before every forward pass."""

    def _note(self) -> None:
        served = self.table.served()
        self.pending = bool((self.open != self.aim).any() or (served != self.aim).any())

    def set_aim(self, served: BoolArray) -> None:
        """Aim at the lanes ``[L, R, H]``; those that are loaded and were closing open again.

        Raises:
            ValueError: if they do not fit into the slots, or leave a head without a lane.
        """
        if (served.sum(axis=2) > self.table.capacity).any():
            raise ValueError("the plan has more lanes on a rank than there are slots")
        if not served.any(axis=1).all():
            raise ValueError("the plan leaves a head without a lane")
        self.aim = served.copy()
        self._detour.clear()
        self._lent.clear()
        self.open |= self.table.served() & self.aim
        self._close()
        self._note()

    def release(self, residents: NDArray[np.integer]) -> bool:
        """Empty the slots of closed lanes without residents ``[L, R, H]``; whether any was."""
        gone = np.argwhere(self.table.served() & ~self.open & (residents == 0))
        for layer, rank, head in gone.tolist():
            self.table.take(layer, rank, head)
        self._note()
        return len(gone) > 0

    def next_moves(self, most: int) -> list[Move]:
        """Up to ``most`` heads that have a free slot to go to; they have it from now on."""
        moves: list[Move] = []
        served = self.table.served()
        missing = self.aim & ~served
        for layer in np.flatnonzero((missing | (self.open != self.aim)).any(axis=(1, 2))).tolist():
            if len(moves) >= most:
                break
            places = np.argwhere(missing[layer]).tolist()
            wanted = [Move(layer, rank, head) for rank, head in places]
            wanted.sort(key=lambda move: move in self._lent)  # lanes that made room come last
            if layer in self._detour:
                wanted.insert(0, self._detour[layer])
            found = [move for move in wanted if self._fits(move)]
            if wanted and not found and not (served[layer] & ~self.open[layer]).any():
                found = self._unblock(layer, missing[layer])
            for move in found[: most - len(moves)]:
                if self._fits(move):
                    self.table.put(*move)
                    moves.append(move)
                    self._lent.discard(move)
                    if self._detour.get(layer) == move:
                        del self._detour[layer]
        return moves

    def arrived(self, moves: list[Move]) -> None:
        """The weights are there: open the lanes, close those that they stand in for."""
        for move in moves:
            self.open[move] = True
        self._close()
        self._note()

    def _fits(self, move: Move) -> bool:
        return self.table.free(move.layer, move.rank) > 0

    def _close(self) -> None:
        """Close unwanted lanes of heads that have another open one."""
        extra = self.open & ~self.aim
        for layer, head in np.argwhere(extra.any(axis=1)).tolist():
            ranks = np.flatnonzero(extra[layer, :, head]).tolist()
            if not (self.open & self.aim)[layer, :, head].any():
                # One stays: where it is least in the way of what its rank waits for. Lanes that
                # made room come back last and do not count, or room would be made for ever.
                missing = self.aim[layer] & ~self.table.served()[layer]
                for lent in self._lent:
                    if lent.layer == layer:
                        missing[lent.rank, lent.head] = False
                waiting = missing.sum(axis=1)
                stays = min(ranks, key=lambda rank: (waiting[rank], rank))
                ranks.remove(stays)
            self.open[layer, ranks, head] = False

    def _unblock(self, layer: int, missing: BoolArray) -> list[Move]:
        """Make room where every rank that waits is full of lanes that nothing stands in for."""
        full = np.flatnonzero(missing.any(axis=1)).tolist()
        open_lanes, count = self.open[layer], self.open[layer].sum(axis=0)
        # Best a copy on a waiting rank, which then has the slot itself; else a free slot anywhere.
        for rank in full:
            for head in np.flatnonzero(open_lanes[rank] & (count > 1)).tolist():
                self._lend(layer, rank, head)
                return []
        rank = full[0]
        head = int(np.flatnonzero(open_lanes[rank] & ~self.aim[layer, rank])[0])
        others = [r for r in range(open_lanes.shape[0]) if not self.table.served()[layer, r, head]]
        for other in others:
            if self.table.free(layer, other) > 0:
                return [Move(layer, other, head)]
        for other in others:
            for copy in np.flatnonzero(open_lanes[other] & (count > 1)).tolist():
                self._lend(layer, other, copy)
                self._detour[layer] = Move(layer, other, head)
                return []
        return []

    def _lend(self, layer: int, rank: int, head: int) -> None:
        self.open[layer, rank, head] = False
        self._lent.add(Move(layer, rank, head))

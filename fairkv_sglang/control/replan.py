# SPDX-License-Identifier: Apache-2.0
"""Plans anew from the traffic while serving, and leads the lanes of all ranks to the new plan.

Rank 0 asks a planner's process (``proposals.py``) every ``EVERY`` prompts. An answer worth adopting
enters SGLang's own channel as a control request, so that every rank gets it between the same two
steps. From then on each rank takes the same small steps before its forward passes: weights of heads
that got a slot come from their homes, new requests are routed to lanes that are loaded, lanes that
the plan does not want drain. Running requests keep their owners and their pages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fairkv_sglang.control.in_force import PlanInForce
from fairkv_sglang.control.proposals import Proposals
from fairkv_sglang.memory.admission import LEAST_RECORDED
from fairkv_sglang.memory.rows import RowBook
from fairkv_sglang.parallel import LaneChanges, TwinWeights
from fairkv_sglang.placement import Plan
from fairkv_sglang.planning import Start

logger = logging.getLogger(__name__)

EVERY = 16
"""Prompts between two questions to the planner."""
FIRST, FIRST_GUESSED = 16, 8
"""Prompts before the first one; and if the plan at start is from another method's profile."""
PIECE_BYTES = 4 << 20
"""Weights that come to a rank before one step, at most, but for a single lane that is larger."""


class Replanner:
    """Re-planning on one rank; decisions are the same on all ranks.

    Args:
        start: What the rank was started with: mode, planner, lane slots.
        book: Rows of this rank: recorder, router, residents, page bounds.
        twins: Weights of this rank's lanes.
        share: Gives every rank what rank 0 passes to it (a broadcast); called by all ranks.
        in_force: Where a plan that is adopted is put.
    """

    def __init__(
        self,
        *,
        start: Start,
        book: RowBook,
        twins: TwinWeights,
        share: Callable[[Any], Any],
        in_force: PlanInForce,
    ) -> None:
        self.mode = start.config.replan
        self.adopted = 0
        self.passes = 0  # before which lanes changed
        self.seconds = 0.0  # spent on that, before all passes
        self.longest = 0.0  # before one of them
        self._planner = start.planner.model_dump()
        self._book, self._twins = book, twins
        self._share, self._in_force = share, in_force
        self._heads = book.heads
        self._changes = LaneChanges(book.heads.table)
        self._is_first = self._heads.rank == 0
        self._proposals = Proposals(self._answered)
        if self._is_first:
            self._proposals.start()
        self._answer: dict[str, Any] | None = None  # written by the planner's thread
        self._announced = False
        self._next = FIRST_GUESSED if start.guessed else FIRST
        self._forced = False
        self._steps_of_change = 0
        self._waits = False
        self._gaps: list[int] = []  # layers that may have empty slots between lanes

    # -- rank 0: asking -------------------------------------------------------------------------

    def force(self) -> None:
        """Plan from what has been seen so far and adopt the plan whatever it gains."""
        self._forced = True
        self._ask()

    def take_answer(self) -> bool:
        """Rank 0, between steps: whether all ranks are to adopt a plan; true once for each."""
        if self._answer is None or self._announced:
            return False
        self._announced = True
        return True

    def _ask(self) -> None:
        recorder = self._book.recorder
        if not self._is_first or self._proposals.busy or self._answer is not None:
            return
        if recorder.prompts < LEAST_RECORDED:
            return
        forced, self._forced = self._forced, False
        self._next = recorder.count + EVERY
        self._proposals.ask(
            {
                "requests": recorder.requests(),
                "served": self._changes.aim.copy(),
                "planner": self._planner,
                "forced": forced,
            }
        )

    def _answered(self, answer: dict[str, Any]) -> None:
        """On the planner's thread."""
        if "error" in answer:
            logger.warning("FairKV: no new plan, %s", answer["error"])
            return
        said = (
            f"{answer['gain']:.3f}x by the model, from {answer['requests']} prompts, made in "
            f"{answer['seconds']:.2f} s"
        )
        if answer["plan"] is None:
            logger.debug("FairKV: the lanes stay, a new plan would be %s", said)
        elif self.mode == "advise":
            logger.info("FairKV: a new plan would be %s (--fairkv-replan advise)", said)
        else:
            logger.info("FairKV: new plan, %s", said)
            self._answer = answer

    # -- all ranks, between the same two steps --------------------------------------------------

    def adopt(self) -> None:
        """Take over the plan that rank 0 has; every rank calls this at the same time."""
        answer, self._answer, self._announced = self._answer, None, False
        text = self._share(answer["plan"] if answer else None)
        if text is None:
            return
        try:  # the same text on all ranks, so that they fail alike
            plan = Plan.from_json(text)
            self._changes.set_aim(plan.shares() > 0)
        except ValueError as error:
            logger.warning("FairKV: the new plan is not adopted: %s", error)
            return
        self._waits = False
        self._book.router.lane_tokens = int(plan.info.get("lane_tokens", 0))
        self._route()
        self.adopted += 1
        self._steps_of_change = 0
        self._book.log.add("plan", self.adopted, plan.digest.encode())
        self._in_force.adopt(plan)

    def step(self) -> None:
        """Before a forward pass, after the pages of finished requests went back."""
        if self._is_first and (self._forced or self._book.recorder.count >= self._next):
            self._ask()
        if not self._changes.pending:
            if self._gaps:
                self._close_gaps()
            return
        started = time.perf_counter()
        self._steps_of_change += 1
        before = self._changes.open.copy()
        released = self._changes.release(self._book.residents.count)
        if self._waits and not released:  # for requests to leave: nothing else has changed
            return
        moves = self._changes.next_moves(max(1, PIECE_BYTES // self._twins.lane_bytes))
        if moves:
            self._twins.bring(moves)
            self._changes.arrived(moves)
            for move in moves:
                self._book.log.add("lane", move.rank, np.array(move).tobytes())
        if released:
            self._twins.settle()
        self._waits = not moves and not (before != self._changes.open).any()
        if (before != self._changes.open).any():
            self._route()
        if released or moves:
            self._note_time(started)
        if not self._changes.pending:
            # Under CUDA graphs all slots are paid for, so there is nothing to gain.
            self._gaps = [] if self._twins.fixed_width else list(range(self._heads.plan.num_layers))
            logger.info(
                "FairKV: all lanes of plan %d are in place after %d passes, %.1f MiB of weights "
                "came to rank %d so far",
                self.adopted,
                self._steps_of_change,
                self._twins.bytes_brought / (1 << 20),
                self._heads.rank,
            )

    def _close_gaps(self) -> None:
        """Lanes move together where a plan has left slots empty between them.

        Decode multiplies with the slots up to the last one in use, so a gap costs as much as a lane
        does. Done a piece at a time when the plan's lanes are in place; all ranks keep the same
        table.
        """
        started = time.perf_counter()
        table, rank = self._heads.table, self._heads.rank
        most = left = max(1, PIECE_BYTES // self._twins.lane_bytes)
        while self._gaps and left:
            layer = self._gaps[-1]
            moved = False
            for other in range(table.head.shape[1]):
                slots = table.close_gap(layer, other)
                if slots is None:
                    continue
                moved = True
                if other == rank:
                    self._twins.shift(layer, *slots)
                    start = self._heads.lane_start[layer]
                    self._book.shift_lane(start + slots[0], start + slots[1])
            if moved:
                left -= 1
            else:
                self._gaps.pop()
        if left < most:
            self._note_time(started)

    def _note_time(self, started: float) -> None:
        took = time.perf_counter() - started
        self.passes += 1
        self.seconds += took
        self.longest = max(self.longest, took)

    @property
    def pending(self) -> bool:
        """Whether lanes are still under way to the last plan."""
        return self._changes.pending

    def _route(self) -> None:
        self._book.router.set_lanes(self._changes.open)
        self._book.demand.set_lanes(self._changes.open)

# SPDX-License-Identifier: Apache-2.0
"""What one rank's process holds: configuration, placement, budgets, memory.

SGLang builds a rank in stages (weights, pools, attention backend, scheduler); hooks at each stage
find the rank's state here. There is one rank per process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fairkv_sglang.parallel import LaneTable, RankHeads, TwinWeights
from fairkv_sglang.placement import Plan, Router
from fairkv_sglang.planning import Start, budget_text

if TYPE_CHECKING:
    from fairkv_sglang.attention.forward_plan import ForwardPlan
    from fairkv_sglang.control.replan import Replanner
    from fairkv_sglang.memory.rows import RowBook
    from fairkv_sglang.memory.sizing import MemoryDivision

logger = logging.getLogger(__name__)


class FairKVRuntime:
    """State of one rank; see :func:`create_runtime`."""

    def __init__(
        self,
        *,
        start: Start,
        heads: RankHeads,
        verify_hooks: Callable[[], list[str]],
    ) -> None:
        self.start = start
        self.config = start.config
        self.model = start.model
        self.plan = start.plan
        self.scope = start.scope
        self.scorer = start.scorer
        self.heads = heads
        self.verify_hooks = verify_hooks
        self.router = Router(start.plan)
        self.forward_plan: ForwardPlan | None = None
        self.division: MemoryDivision | None = None
        self.prefill_backend = ""  # class of SGLang's backend for prompts
        self.decode_backend = ""  # name of the implementation that decodes
        self.prefill_seconds = 0.0
        self.compress_seconds = 0.0
        self.hand_over_seconds = 0.0  # of it: packing, waiting for and storing what travels
        self.hand_over_bytes = 0  # kept rows that left this rank
        self.twins: TwinWeights | None = None
        self.replanner: Replanner | None = None
        self.plan_source = start.source
        self._book: RowBook | None = None

    @property
    def tp_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.plan.tp_size

    @property
    def book(self) -> RowBook:
        """The rows of this rank; exists from the moment at which SGLang has its pools."""
        if self._book is None:
            raise RuntimeError("FairKV: SGLang asked for head pages before its pools exist")
        return self._book

    def create_book(self, division: MemoryDivision, dtype: torch.dtype, device: str) -> RowBook:
        """Allocate the arena and the page tables of this rank."""
        from fairkv_sglang.kernels import HeadPages
        from fairkv_sglang.memory import PageDemand, PageLedger
        from fairkv_sglang.memory.rows import RowBook

        rank = self.heads.rank
        pages = HeadPages.create(
            num_pages=int(division.arena_pages[rank]),
            rows=division.max_requests + 1,
            lanes=self.heads.num_lanes,
            max_pages=division.max_pages,
            head_dim=self.model.head_dim,
            dtype=dtype,
            device=device,
        )
        self.division = division
        self._book = RowBook(
            heads=self.heads,
            scope=self.scope,
            demand=PageDemand(
                self.scope,
                self.plan.shares() > 0,
                None if self.heads.table.fixed else self.heads.table.capacity,
            ),
            router=self.router,
            ledger=PageLedger(np.asarray(division.arena_pages)),
            pages=pages,
            pool_tokens=division.pool_tokens,
            window=self.config.replan_window,
            verbose=self.config.debug.log_decisions,
        )
        return self._book

    def build_twins(
        self, modules: Sequence[torch.nn.Module], group: torch.distributed.ProcessGroup | None
    ) -> None:
        """Make the decode twins of SGLang's attention ``modules``, layer by layer, and fill them.

        All ranks of ``group`` call this at the same time.
        """
        on_cuda = self.start.device.startswith("cuda")
        self.twins = TwinWeights(
            modules, self.heads, self.model.head_dim, group, fixed_width=on_cuda
        )
        self.twins.build()
        logger.info("FairKV: %s", self.twins.describe())

    def start_replanning(self, share: Callable[[Any], Any]) -> None:
        """Watch the traffic from now on, if the configuration says so.

        Args:
            share: Broadcast from rank 0; see :class:`fairkv_sglang.control.replan.Replanner`.
        """
        from fairkv_sglang.control.replan import Replanner

        if self.start.slots is None or self.twins is None:
            return
        self.replanner = Replanner(
            start=self.start,
            book=self.book,
            twins=self.twins,
            share=share,
            adopted=self._adopted,
        )

    def _adopted(self, plan: Plan) -> None:
        self.plan, self.plan_source = plan, "traffic"

    @property
    def planned_balancedness(self) -> float:
        """Mean over max of the ranks' tokens, as the plan expects it."""
        imbalance = self.plan.info.get("token_imbalance")
        return 1.0 / imbalance if isinstance(imbalance, float) and imbalance > 0 else 1.0

    def describe(self) -> str:
        """One line that says what is on."""
        info = self.plan.info
        balance = info.get("token_imbalance")
        planned = f", planned max/mean {balance:.3f}" if isinstance(balance, float) else ""
        return (
            f"FairKV on: scorer {self.config.scorer}, scope {self.config.scope}, budget "
            f"{budget_text(self.config)}, placement {self.plan.policy} over {self.tp_size} ranks "
            f"with {int(self.plan.copy_counts().sum())} copies{planned}, plan "
            f"{self.plan.digest[:12]} from {self.start.text}; rank {self.heads.rank} "
            f"serves {sum(map(len, self.heads.heads))} lanes"
        )


def create_runtime(start: Start, rank: int, verify_hooks: Callable[[], list[str]]) -> FairKVRuntime:
    """Build the state of this rank before its model is loaded."""
    # Advice alone changes no lane and needs no room for one.
    table = LaneTable(start.plan, None if start.config.replan == "advise" else start.slots)
    heads = RankHeads(start.plan, rank, start.model.group_size, table)
    start.scope.home_size = heads.homes.per_rank
    global _runtime
    _runtime = FairKVRuntime(start=start, heads=heads, verify_hooks=verify_hooks)
    logger.info(_runtime.describe())
    return _runtime


_runtime: FairKVRuntime | None = None


def get_runtime() -> FairKVRuntime:
    """This rank's state.

    Raises:
        RuntimeError: before the model is loaded; it means that a hook did not take effect.
    """
    if _runtime is None:
        raise RuntimeError(
            "FairKV: no rank state in this process; the hook before ModelRunner.load_model "
            "did not take effect"
        )
    return _runtime

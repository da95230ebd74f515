# SPDX-License-Identifier: Apache-2.0
"""What the hooks of this process's rank have built so far.

SGLang builds a rank in stages (weights, pools, attention backend, scheduler), and the hook at each
stage adds its part. There is one rank per process. Only hooks look it up; everything else gets what
it needs in its constructor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from fairkv_sglang.attention.compress_outputs import OutputCompressor
from fairkv_sglang.budgets.scorers.base import Gate
from fairkv_sglang.control.in_force import PlanInForce
from fairkv_sglang.control.metrics import Exporter
from fairkv_sglang.control.replan import Replanner
from fairkv_sglang.control.server_info import RankReport
from fairkv_sglang.memory import MemoryDivision
from fairkv_sglang.memory.rows import RowBook
from fairkv_sglang.parallel import LaneTable, RankHeads, TwinWeights
from fairkv_sglang.planning import Start, budget_text, outputs_text
from fairkv_sglang.transfer.rows import Moved

if TYPE_CHECKING:  # a subclass of SGLang's, which is not to be imported before its platform is
    from fairkv_sglang.patches.attention_backend import FairKVAttnBackend
    from fairkv_sglang.patches.repeating import Repeats

MADE_BY = {
    "twins": "after ModelRunner.load_model",
    "division": "after KVCacheConfigurator._resolve_memory_pool_config",
    "book": "after KVCacheConfigurator.configure",
    "backend": "after attention_backend_setup._build_resolved_backend",
    "report": "after Scheduler.__init__",
}
"""The hook that adds each part."""


class Rank:
    """One rank; complete before the model is loaded but for the parts of ``MADE_BY``.

    Args:
        start: Configuration, model, budgets and plan.
        rank: Tensor-parallel rank of this process.
        role: SGLang's ``--disaggregation-mode``: ``null``, ``prefill`` or ``decode``.
    """

    twins: TwinWeights
    division: MemoryDivision
    book: RowBook
    backend: FairKVAttnBackend
    report: RankReport
    outputs: OutputCompressor | None = None  # None where outputs are all kept
    replanner: Replanner | None = None  # None where plans never change
    exporter: Exporter | None = None  # None where metrics are off
    repeats: Repeats | None = None  # None unless the scorer has prompts repeated
    gates: Mapping[int, Gate] | None = None  # None unless the scorer reads hidden states

    def __init__(self, start: Start, rank: int, role: str = "null") -> None:
        self.start, self.config, self.model = start, start.config, start.model
        self.scorer, self.scope = start.scorer, start.scope
        table = LaneTable(start.plan, start.room)
        self.heads = RankHeads(start.plan, rank, start.model.group_size, table)
        self.scope.home_size = self.heads.homes.per_rank
        self.in_force = PlanInForce(start.plan, start.source)
        self.role = role
        self.moved = Moved()  # kept rows, from or to the other server

    def __getattr__(self, part: str) -> NoReturn:
        if part not in MADE_BY:
            raise AttributeError(part)
        raise RuntimeError(
            f"FairKV: this rank has no {part} yet; the hook {MADE_BY[part]} did not take effect"
        )

    @property
    def tp_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.heads.plan.tp_size

    def describe(self) -> str:
        """One line that says what is on."""
        plan, config = self.in_force.plan, self.config
        balance = plan.info.get("token_imbalance")
        planned = f", planned max/mean {balance:.3f}" if isinstance(balance, float) else ""
        return (
            f"FairKV on: scorer {config.scorer}, scope {config.scope}, budget "
            f"{budget_text(config)}, placement {plan.policy} over {self.tp_size} ranks "
            f"with {int(plan.copy_counts().sum())} copies{planned}, {outputs_text(config)}, plan "
            f"{plan.digest[:12]} from {self.start.text}; rank {self.heads.rank} "
            f"serves {sum(map(len, self.heads.heads))} lanes"
        )


_rank: Rank | None = None


def begin(rank: Rank) -> None:
    """Make ``rank`` this process's."""
    global _rank
    _rank = rank


def this_rank() -> Rank:
    """This process's rank.

    Raises:
        RuntimeError: before the model is loaded; it means that a hook did not take effect.
    """
    if _rank is None:
        raise RuntimeError(
            "FairKV: no rank state in this process; the hook before ModelRunner.load_model "
            "did not take effect"
        )
    return _rank

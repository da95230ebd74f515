# SPDX-License-Identifier: Apache-2.0
"""What one rank's process holds: configuration, placement, budgets, memory.

SGLang builds a rank in stages (weights, pools, attention backend, scheduler); hooks at each stage
find the rank's state here. There is one rank per process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fairkv_sglang.budgets import (
    BudgetScope,
    BudgetSpec,
    Scorer,
    make_scope,
    make_scorer,
)
from fairkv_sglang.parallel import RankHeads
from fairkv_sglang.placement import CostModel, Plan, Router, make_plan
from fairkv_sglang.profiles import HeadProfile, read_profile

if TYPE_CHECKING:
    from fairkv_sglang.attention.forward_plan import ForwardPlan
    from fairkv_sglang.config import FairKVConfig
    from fairkv_sglang.memory.rows import RowBook
    from fairkv_sglang.memory.sizing import MemoryDivision

logger = logging.getLogger(__name__)

# Coefficient of variation of a head's kept tokens between small batches, from the per-request
# counts of Tangram's four scorers on Llama-3.1-8B (docs/placement.md).
REQUEST_SPREAD = 0.3


# Decode time given for even lanes, which prefill waits for (placement/lanes.py).
LANE_TOLERANCE = 1.02


@dataclass(frozen=True)
class ModelShape:
    """What placement and budgets need to know of a model."""

    name: str
    num_layers: int
    num_kv_heads: int
    group_size: int  # query heads per KV head
    head_dim: int
    hidden_size: int
    dtype_bytes: int
    device: str = "cuda"  # kind of device, whose constants the load model takes


class FairKVRuntime:
    """State of one rank; see :func:`create_runtime`."""

    def __init__(
        self,
        *,
        config: FairKVConfig,
        shape: ModelShape,
        plan: Plan,
        scope: BudgetScope,
        scorer: Scorer,
        heads: RankHeads,
        verify_hooks: Callable[[], list[str]],
    ) -> None:
        self.config = config
        self.shape = shape
        self.plan = plan
        self.scope = scope
        self.scorer = scorer
        self.heads = heads
        self.verify_hooks = verify_hooks
        self.router = Router(plan)
        self.forward_plan: ForwardPlan | None = None
        self.division: MemoryDivision | None = None
        self.prefill_seconds = 0.0
        self.compress_seconds = 0.0
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
        from fairkv_sglang.kernels import ops
        from fairkv_sglang.kernels.pages import HeadPages
        from fairkv_sglang.memory import PageDemand, PageLedger
        from fairkv_sglang.memory.rows import RowBook

        rank = self.heads.rank
        pages = HeadPages.create(
            num_pages=int(division.arena_pages[rank]),
            rows=division.max_requests + 1,
            lanes=self.heads.num_lanes,
            max_pages=division.max_pages,
            head_dim=self.shape.head_dim,
            dtype=dtype,
            device=device,
        )
        ops.warm_up(dtype, self.shape.head_dim, self.shape.group_size, device)
        self.division = division
        self._book = RowBook(
            heads=self.heads,
            scope=self.scope,
            demand=PageDemand(self.scope, self.plan),
            router=self.router,
            ledger=PageLedger(np.asarray(division.arena_pages)),
            pages=pages,
            pool_tokens=division.pool_tokens,
            verbose=self.config.log_decisions,
        )
        return self._book

    def describe(self) -> str:
        """One line that says what is on."""
        info = self.plan.info
        balance = info.get("token_imbalance")
        planned = f", planned max/mean {balance:.3f}" if isinstance(balance, float) else ""
        return (
            f"FairKV on: scorer {self.config.scorer}, scope {self.config.scope}, budget "
            f"{budget_text(self.config)}, placement {self.plan.policy} over {self.tp_size} ranks "
            f"with {int(self.plan.copy_counts().sum())} copies{planned}; rank {self.heads.rank} "
            f"serves {self.heads.num_lanes} lanes"
        )


def budget_text(config: FairKVConfig) -> str:
    """The budget as a person would say it."""
    if config.budget is not None:
        return f"{config.budget} tokens per head"
    return f"{config.effective_ratio:.0%} of the prompt"


def make_budgets(
    config: FairKVConfig, num_layers: int, num_kv_heads: int
) -> tuple[Scorer, BudgetScope, HeadProfile | None]:
    """Scorer, scope and profile of a configuration.

    Raises:
        ValueError: in one line, for a profile of another model or a budget that cannot be met.
    """
    if config.scorer == "snapkv":
        scorer = make_scorer(
            "snapkv", window=config.window, kernel=config.kernel_size, pooling=config.pooling
        )
    else:
        scorer = make_scorer(config.scorer, sink=config.sink, recent=config.window)
    profile = read_profile(config.profile) if config.profile is not None else None
    spec = BudgetSpec(
        tokens=config.budget, ratio=config.effective_ratio, floor_alpha=config.floor_alpha
    )
    scope = make_scope(config.scope, spec, num_layers, num_kv_heads, scorer, profile)
    return scorer, scope, profile


def make_placement(
    config: FairKVConfig, shape: ModelShape, scope: BudgetScope, tp_size: int
) -> Plan:
    """The plan file of the configuration, or a plan made from the profile.

    Raises:
        ValueError: in one line, if a plan file is for another model or number of ranks, or if the
            placement has copies and the budget scope allows none.
    """
    if config.plan is not None:
        plan = Plan.from_file(config.plan)
        wanted = (shape.num_layers, shape.num_kv_heads, tp_size)
        found = (plan.num_layers, plan.num_kv_heads, plan.tp_size)
        if found != wanted:
            raise ValueError(
                f"plan {config.plan} is for {found[0]} layers, {found[1]} KV heads, TP {found[2]}; "
                f"this server has {wanted[0]} layers, {wanted[1]} KV heads, TP {wanted[2]}"
            )
        return _checked(config, plan)
    cost = CostModel.for_device(
        shape.device,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        group=shape.group_size,
        weight_bytes=shape.dtype_bytes,
        kv_bytes=shape.dtype_bytes,
        batch=config.expected_batch,
    )
    loads = scope.expected(config.expected_prompt).astype(np.float64)
    if config.expected_output:
        cost = cost.with_prefill(config.expected_prompt, config.expected_output)
        loads = loads + config.expected_output / 2  # a request is half done on average
    plan = make_plan(
        config.placement,
        loads,
        tp_size,
        cost=cost,
        model=shape.name,
        max_copies_per_layer=config.max_copies,
        lane_tolerance=LANE_TOLERANCE,
        # Requests differ from a measured profile when scores decide; copies that pay for it leave
        # the router room to even that out. Static budgets do not differ.
        spread=REQUEST_SPREAD if scope.input_dependent and scope.profile is not None else 0.0,
    )
    if "prefill" in plan.info:
        logger.warning("--fairkv-expected-output: prefill is %s", plan.info["prefill"])
    return _checked(config, plan)


def _checked(config: FairKVConfig, plan: Plan) -> Plan:
    if config.scope == "rank" and int(plan.copy_counts().sum()):
        raise ValueError(
            "budget scope 'rank' shares a budget over the heads of one rank, so no head can be on "
            "two: use --fairkv-placement contiguous or best_effort, or --fairkv-scope layer"
        )
    return plan


def create_runtime(
    config: FairKVConfig,
    shape: ModelShape,
    tp_size: int,
    rank: int,
    verify_hooks: Callable[[], list[str]],
) -> FairKVRuntime:
    """Build the state of this rank before its model is loaded.

    Raises:
        ValueError: in one line, for anything in the configuration that does not fit the model.
    """
    scorer, scope, _ = make_budgets(config, shape.num_layers, shape.num_kv_heads)
    plan = make_placement(config, shape, scope, tp_size)
    global _runtime
    _runtime = FairKVRuntime(
        config=config,
        shape=shape,
        plan=plan,
        scope=scope,
        scorer=scorer,
        heads=RankHeads(plan, rank, shape.group_size),
        verify_hooks=verify_hooks,
    )
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

# SPDX-License-Identifier: Apache-2.0
"""Everything that decides a run of ``fairkv bench``, and what follows from it for each engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fairkv_sglang.bench.model import BenchModel
from fairkv_sglang.bench.variants import VARIANTS
from fairkv_sglang.bench.workload import Workload
from fairkv_sglang.budgets import SCOPES

MEASURE_VARIABLE = "FAIRKV_MEASURE_WAIT"
ROOM_FOR_IMBALANCE = 1.7
"""Pages of the fullest rank over the mean, for the default KV memory: the most that contiguous
placement needs on the profiles of `docs/results/placement.md` at TP 2."""


class Settings(BaseModel):
    """A run; lengths and budgets in tokens.

    Attributes:
        model_path: A checkpoint of your own; None builds ``model``.
        model: Shape of the model to build.
        profile: Head profile, mapped onto a built model; None makes a synthetic one.
        tp_sizes: Tensor-parallel sizes, each with all budgets.
        budgets: Mean kept tokens per head, window included; empty if ``ratio`` is given.
        ratio: Budget as a share of the prompt.
        variants: Names from ``variants``.
        rounds: Measured runs of each variant.
        scope: Budget scope of the variants with budgets.
        window: Tokens at the prompt's end that every head keeps.
        floor_alpha: Part of the budget that every head keeps in any case.
        max_total_tokens: KV memory of a rank as tokens of full KV, the same for every variant;
            None: enough for all requests to decode at once under the budget.
        chunked_prefill_size: Tokens of a prefill pass, the same for every variant.
        keep_alive: Most engines alive at once; None: as many as fit into memory.
        measure: Record time between and in collectives.
        server: Further SGLang server arguments, for every variant.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_path: Path | None = None
    model: BenchModel = BenchModel()
    profile: Path | None = None
    tp_sizes: tuple[int, ...] = (2,)
    budgets: tuple[int, ...] = (256,)
    ratio: float | None = Field(default=None, gt=0, le=1)
    variants: tuple[str, ...]
    rounds: int = Field(default=5, ge=1)
    workload: Workload
    scope: Literal["uniform", "head", "layer"] = "head"
    window: int = Field(default=16, ge=1)
    floor_alpha: float = Field(default=0.2, ge=0, le=1)
    max_total_tokens: int | None = Field(default=None, gt=0)
    chunked_prefill_size: int = Field(default=2048, gt=0)
    dtype: str = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    keep_alive: int | None = Field(default=None, ge=1)
    measure: bool = True
    server: dict[str, Any] = {}

    def cases(self) -> list[tuple[int, dict[str, Any]]]:
        """``(tp, budget options)`` of every case."""
        budgets: list[dict[str, Any]]
        if self.ratio is not None:
            budgets = [{"ratio": self.ratio}]
        else:
            budgets = [{"budget": budget} for budget in self.budgets]
        return [(tp, budget) for tp in self.tp_sizes for budget in budgets]

    def mean_budget(self, budget: dict[str, Any]) -> float:
        """Mean kept tokens per head and request of a case."""
        if "budget" in budget:
            return float(min(budget["budget"], self.workload.mean_prompt))
        return float(budget["ratio"] * self.workload.mean_prompt)

    def total_tokens(self, budget: dict[str, Any]) -> int:
        """KV memory of a case, as tokens of full KV."""
        if self.max_total_tokens is not None:
            return self.max_total_tokens
        work = self.workload
        kept = self.mean_budget(budget) * ROOM_FOR_IMBALANCE + work.output_length + 32
        # A prefill pool for the longest prompt and a chunk, an eighth of the memory at least.
        pool = self.context + self.chunked_prefill_size
        heads = work.prompts * kept
        return math.ceil(max(heads + pool, heads * 8 / 7) * 1.1 / 64) * 64

    @property
    def context(self) -> int:
        """Context length of the engines."""
        return math.ceil((self.workload.longest + 64) / 256) * 256

    def worker_options(
        self, name: str, tp: int, budget: dict[str, Any], model: Path, profile: Path | None
    ) -> dict[str, Any]:
        """What the worker needs to start a variant's engine; FairKV's options are None for stock.

        Args:
            name: The variant.
            tp: Ranks.
            budget: ``{"budget": tokens}`` or ``{"ratio": share}``.
            model: The checkpoint.
            profile: Head profile of the model, for the scopes that use one.
        """
        variant = VARIANTS[name]
        engine: dict[str, Any] = {
            "model_path": str(model),
            "tp_size": tp,
            "dtype": self.dtype,
            "device": self.device,
            "max_total_tokens": self.total_tokens(budget),
            "chunked_prefill_size": self.chunked_prefill_size,
            "context_length": self.context,
            "skip_tokenizer_init": True,
            "enable_metrics": True,  # time stamps of requests
            "dist_timeout": 24 * 3600,  # engines are frozen between their turns
            "random_seed": 1,
            "log_level": "warning",
        }
        if variant.flags:  # what FairKV sets or needs, as far as stock SGLang has it
            backend = "flashinfer" if self.device == "cuda" else "torch_native"
            engine |= {"attention_backend": backend, "disable_prefill_cuda_graph": True}
        engine |= self.server
        if variant.placement is None:
            return {"fairkv": None, "engine": engine}
        scope = variant.scope or self.scope
        fairkv = {
            "window": self.window,
            "expected_batch": self.workload.prompts,
            "expected_prompt": round(self.workload.mean_prompt),
            "placement": variant.placement,
            "scope": scope,
            **({"ratio": 1.0} if variant.keep_all else budget),
        }
        if "floor_alpha" in SCOPES.options(scope):
            fairkv["floor_alpha"] = self.floor_alpha
        if profile is not None and scope in ("head", "layer"):
            fairkv["profile"] = str(profile)
        return {"fairkv": fairkv, "engine": engine}

    def environment(self) -> dict[str, str]:
        """Variables of the engines: nobody's own configuration, and measuring."""
        return {
            "FAIRKV_CONFIG": "",
            "FAIRKV_RESOLVED": "",
            MEASURE_VARIABLE: "1" if self.measure else "0",
            "HF_HUB_OFFLINE": "1",
        }

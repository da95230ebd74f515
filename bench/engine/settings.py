# SPDX-License-Identifier: Apache-2.0
"""Everything that decides a run of ``fairkv bench``, and what follows from it for each engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, Json, field_validator, model_validator

from fairkv_sglang.bench.flags import MODELS, AnyModel, Ints, Names, Settings, known

ROOM_FOR_IMBALANCE = 1.7
"""Pages of the fullest rank over the mean, for the default KV memory: the most that contiguous
placement needs on the profiles of `docs/results/placement.md` at TP 2."""
FIRST_ID = 3
"""Ids below are special tokens of the models that the benchmark builds."""


class Variant(NamedTuple):
    """One way of serving.

    Attributes:
        text: One line for people.
        placement: FairKV's policy; None for stock SGLang.
        scope: Budget scope instead of the run's own.
        keep_all: FairKV keeps the whole prompt (its kernels without its budgets).
    """

    text: str
    placement: str | None = None
    scope: str | None = None
    keep_all: bool = False

    @property
    def has_budget(self) -> bool:
        """Whether the budget matters to this variant."""
        return self.placement is not None and not self.keep_all


VARIANTS = {
    "stock": Variant("SGLang, full KV, default flags"),
    "contiguous": Variant("budgets, plain tensor parallelism", "contiguous"),
    "best_effort": Variant("budgets, heads placed by load, no copies", "best_effort"),
    "equal_shares": Variant("budgets, fair-copying with equal shares", "equal_shares"),
    "fair_copying": Variant("budgets, fair-copying", "fair_copying"),
    "rank_local": Variant(
        "each rank shares a budget of its own among its heads: balanced because it keeps other "
        "tokens than one rank would; at TP = KV heads it is one uniform budget",
        "contiguous",
        "rank",
    ),
    "full": Variant("FairKV's kernels, full KV", "contiguous", "uniform", keep_all=True),
}
BASE = "contiguous"
"""Balancing is measured against this variant."""
EVERY = tuple(VARIANTS)[:6]
"""``--variants all``; ``full`` tells what part of a gain over stock is the kernels'."""


class EngineSettings(Settings):
    """A run; lengths and budgets in tokens."""

    variants: Names = Field(
        ("stock", BASE, "fair_copying"),
        description=f"of {', '.join(VARIANTS)}; all: {', '.join(EVERY)}",
    )
    model: AnyModel = Field(
        MODELS["qwen3-0.6b"],
        description=f"random weights: {', '.join(MODELS)}, with ,layers=N,group=N.. to change it",
    )
    model_path: Path | None = Field(None, description="a checkpoint of your own instead")
    profile: Path | None = Field(
        None, description="head profile, mapped onto the model; none: synthetic"
    )
    tp: Ints = Field((2,), description="tensor-parallel sizes, each with all budgets")
    budgets: Ints = Field((256,), description="mean kept tokens per head")
    ratio: float | None = Field(
        None, gt=0, le=1, description="budget as a share of the prompt, instead of --budgets"
    )
    fairkv: Json[dict[str, Any]] | dict[str, Any] = Field(
        {}, description='further options of the variants with budgets, e.g. {"scope": "layer"}'
    )
    server: Json[dict[str, Any]] | dict[str, Any] = Field(
        {}, description='further server arguments of all variants, e.g. {"page_size": 1}'
    )
    rounds: int = Field(3, ge=1, description="measured runs of each variant")
    prompts: int = Field(16, ge=1, description="requests of a run, all at once")
    prompt_len: Ints = Field((1024,), description="prompt tokens; requests take them in turn")
    output_len: int = Field(64, gt=1, description="new tokens of a request")
    shared_prefix: int = Field(
        0,
        ge=0,
        description="first tokens that all prompts of a round have in common, as questions about "
        "one document have: computed once, read in decode for each",
    )
    max_total_tokens: int | None = Field(
        None,
        gt=0,
        description="KV memory of a rank as tokens of full KV, the same for all; none: all "
        "requests can decode at once under the budget",
    )
    chunked_prefill_size: int = Field(2048, gt=0, description="tokens of a prefill pass")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="of weights and KV"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="cpu or cuda")
    keep_alive: int | None = Field(
        None, ge=1, description="most engines alive at once; none: as many as fit into memory"
    )
    measure: bool = Field(
        True, description="record where a step's time goes; on CUDA it slows steps down"
    )

    @field_validator("variants")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return known(names, tuple(VARIANTS), EVERY)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.shared_prefix >= min(self.prompt_len):
            raise ValueError(
                f"a shared prefix of {self.shared_prefix} tokens leaves nothing of a prompt of "
                f"{min(self.prompt_len)}; give a shorter one"
            )
        if self.ratio is not None and "budgets" in self.model_fields_set:
            raise ValueError("--budgets and --ratio exclude each other: give tokens or a share")
        return self

    def cases(self) -> list[tuple[int, dict[str, Any]]]:
        """``(tp, budget options)`` of every case."""
        budgets: list[dict[str, Any]] = [{"budget": budget} for budget in self.budgets]
        if self.ratio is not None:
            budgets = [{"ratio": self.ratio}]
        return [(tp, budget) for tp in self.tp for budget in budgets]

    def lengths(self) -> list[int]:
        """Prompt length of each request."""
        return [self.prompt_len[i % len(self.prompt_len)] for i in range(self.prompts)]

    def make_prompts(self, vocab: int, round_index: int) -> list[list[int]]:
        """Random prompts of a round; no two share more than ``shared_prefix``, rounds nothing."""
        generator = np.random.default_rng(round_index)
        shared = generator.integers(FIRST_ID, vocab, size=self.shared_prefix).tolist()
        return [
            shared + generator.integers(FIRST_ID, vocab, size=length - len(shared)).tolist()
            for length in self.lengths()
        ]

    @property
    def mean_prompt(self) -> float:
        """Mean prompt length in tokens."""
        return sum(self.lengths()) / self.prompts

    @property
    def context(self) -> int:
        """Context length of the engines."""
        return math.ceil((max(self.prompt_len) + self.output_len + 64) / 256) * 256

    def total_tokens(self, budget: dict[str, Any]) -> int:
        """KV memory of a case, as tokens of full KV."""
        if self.max_total_tokens is not None:
            return self.max_total_tokens
        prompt = self.mean_prompt
        mean = budget["ratio"] * prompt if "ratio" in budget else min(budget["budget"], prompt)
        heads = self.prompts * (mean * ROOM_FOR_IMBALANCE + self.output_len + 32)
        # A prefill pool for the longest prompt and a chunk, an eighth of the memory at least.
        pool = self.context + self.chunked_prefill_size
        return math.ceil(max(heads + pool, heads * 8 / 7) * 1.1 / 64) * 64

    def worker_options(
        self, name: str, tp: int, budget: dict[str, Any], model: Path, profile: Path
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
        engine = {
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
            **self.server,
        }
        if variant.placement is None:
            return {"fairkv": None, "engine": engine}
        fairkv = {
            "scope": "head",
            "window": 16,
            "expected_batch": self.prompts,
            "expected_prompt": round(self.mean_prompt),
            "placement": variant.placement,
            **({"ratio": 1.0} if variant.keep_all else budget),
            **self.fairkv,
        }
        if variant.scope is not None:
            fairkv["scope"] = variant.scope
        if fairkv["scope"] in ("head", "layer"):
            fairkv["profile"] = str(profile)
        return {"fairkv": fairkv, "engine": engine}

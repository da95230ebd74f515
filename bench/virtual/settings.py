# SPDX-License-Identifier: Apache-2.0
"""Everything that decides a run with virtual ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from fairkv_sglang.bench.flags import MODELS, AnyModel, Ints, Names, Settings, known

RANK_LOCAL = "rank_local"
PLACEMENTS = ("contiguous", "best_effort", "equal_shares", "fair_copying", RANK_LOCAL)


class VirtualSettings(Settings):
    """A run; lengths and budgets in tokens. Every (tp, batch, budget) is a case.

    The all-reduce of one message takes ``latency + 2 (R - 1) / R * bytes / bandwidth``: that of a
    ring, in which each byte is sent and received 2 (R - 1) / R times per rank, with one latency
    for the whole collective. Defaults: an NVLink switch within one machine.
    """

    model: AnyModel = Field(MODELS["llama-3.1-8b"], description="as above")
    profile: Path | None = Field(None, description="as above")
    tp: Ints = Field((4,), description="as above")
    batch: Ints = Field((64,), description="requests decoding together")
    budgets: Ints = Field((1024,), description="as above")
    prompt_len: Ints = Field((8192,), description="the most that a head can keep")
    placements: Names = Field(PLACEMENTS, description="policies, and contiguous with equal totals")
    layers: int | None = Field(
        None, ge=1, description="measure this many layers, evenly spaced; none: all"
    )
    repeats: int = Field(5, ge=1, description="measurements of each part, the median counts")
    bandwidth: float = Field(300.0, gt=0, description="all-reduce model: GB/s per direction")
    latency: float = Field(10.0, ge=0, description="all-reduce model: microseconds")
    device: str = Field("cpu", description="as above")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="as above")
    decode: str = Field("auto", description="auto, numba, triton or flashinfer")

    @field_validator("placements")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return known(names, PLACEMENTS, PLACEMENTS)

    def cases(self) -> list[tuple[int, int, int]]:
        """``(tp, batch, budget)`` of every case."""
        return [(t, b, k) for t in self.tp for b in self.batch for k in self.budgets]

    def all_reduce_seconds(self, message_bytes: float, ranks: int) -> float:
        """Time of one all-reduce; nothing for a single rank."""
        if ranks == 1:
            return 0.0
        volume = 2 * (ranks - 1) / ranks * message_bytes
        return self.latency * 1e-6 + volume / (self.bandwidth * 1e9)

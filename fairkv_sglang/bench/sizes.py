# SPDX-License-Identifier: Apache-2.0
"""Models of real size and the links between their ranks, for virtual ranks."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from fairkv_sglang.placement import CostModel


class ModelSizes(BaseModel):
    """Shape of a decoder with grouped-query attention and a gated MLP."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    layers: int = Field(ge=1)
    q_heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=8)
    hidden: int = Field(ge=8)
    intermediate: int = Field(ge=8)
    vocab: int = Field(ge=1)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    def cost_model(self, dtype_bytes: int, batch: int, device: str | None = None) -> CostModel:
        """What the placement policies weigh copies with; bytes alone without a device."""
        sizes = {
            "head_dim": self.head_dim,
            "hidden_size": self.hidden,
            "group": self.group,
            "weight_bytes": dtype_bytes,
            "kv_bytes": dtype_bytes,
            "batch": batch,
        }
        return CostModel(**sizes) if device is None else CostModel.for_device(device, **sizes)


PRESETS: dict[str, ModelSizes] = {
    sizes.name: sizes
    for sizes in (
        # config.json of the public checkpoints
        ModelSizes(
            name="llama-3.1-8b",
            layers=32,
            q_heads=32,
            kv_heads=8,
            head_dim=128,
            hidden=4096,
            intermediate=14336,
            vocab=128256,
        ),
        ModelSizes(
            name="llama-3.3-70b",
            layers=80,
            q_heads=64,
            kv_heads=8,
            head_dim=128,
            hidden=8192,
            intermediate=28672,
            vocab=128256,
        ),
        ModelSizes(
            name="mistral-small-24b",
            layers=40,
            q_heads=32,
            kv_heads=8,
            head_dim=128,
            hidden=5120,
            intermediate=32768,
            vocab=131072,
        ),
        # for tests
        ModelSizes(
            name="tiny",
            layers=4,
            q_heads=16,
            kv_heads=8,
            head_dim=16,
            hidden=64,
            intermediate=128,
            vocab=256,
        ),
    )
}


class Link(BaseModel):
    """All-reduce of one message over the ranks: ``latency + 2 (R - 1) / R * bytes / bandwidth``.

    The bandwidth term is that of a ring (each byte is sent and received 2 (R - 1) / R times per
    rank); the latency is one number for the whole collective. Defaults: an NVLink switch within one
    machine, 10 us and 300 GB/s in each direction.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bandwidth_gb_s: float = Field(default=300.0, gt=0)
    latency_us: float = Field(default=10.0, ge=0)

    def seconds(self, message_bytes: float, ranks: int) -> float:
        """Time of one all-reduce; nothing for a single rank."""
        if ranks == 1:
            return 0.0
        volume = 2 * (ranks - 1) / ranks * message_bytes
        return self.latency_us * 1e-6 + volume / (self.bandwidth_gb_s * 1e9)

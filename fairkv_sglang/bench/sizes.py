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


_SIZES = (
    # config.json of the public checkpoints: layers, query and KV heads, head dimension, hidden
    # size, MLP, vocabulary
    ("llama-3.1-8b", 32, 32, 8, 128, 4096, 14336, 128256),
    ("llama-3.3-70b", 80, 64, 8, 128, 8192, 28672, 128256),
    ("mistral-small-24b", 40, 32, 8, 128, 5120, 32768, 131072),
    ("tiny", 4, 16, 8, 16, 64, 128, 256),  # for tests
)
PRESETS: dict[str, ModelSizes] = {
    str(row[0]): ModelSizes.model_validate(dict(zip(ModelSizes.model_fields, row, strict=True)))
    for row in _SIZES
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

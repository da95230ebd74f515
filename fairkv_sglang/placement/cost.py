# SPDX-License-Identifier: Apache-2.0
"""Load model: what a rank reads in one decode step, per layer.

cost(layer, rank) = lanes * lane cost + sum over its heads of share * batch * expected kept
tokens * KV row. A step waits in every layer for the most loaded rank (all-reduce), so
it costs the sum over layers of the maximum over ranks. Prefill runs on the homes (``homes.py``)
whatever the plan and is no part of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field

from fairkv_sglang.model import Model
from fairkv_sglang.placement.options import FloatArray

DEVICES: dict[str, dict[str, float]] = {
    # Dense bf16 operations over memory bandwidth: 206 (H200), 295 (H100), 156 (A100), from NVIDIA's
    # data sheets. Kernels fuse most passes over activations. Untested on a GPU.
    "cuda": {"ops_per_byte": 200.0, "activation_passes": 4.0},
    # One core of a current server, float32, and torch's unfused element-wise operations: fitted to
    # decode steps of ``fairkv bench`` (docs/placement.md).
    "cpu": {"ops_per_byte": 4.0, "activation_passes": 16.0},
}
"""Constants of a kind of device for :meth:`CostModel.for_device`."""


class CostModel(BaseModel):
    """Sizes of one model and of the expected traffic; costs are in seconds or in bytes.

    A head's weight slice holds its k and v rows and the q rows and o columns of its ``group``
    query heads: (2 * group + 2) * head_dim * hidden_size parameters of ``weight_bytes`` bytes
    (0.5 for 4 bit; scales counted by a slightly larger number). A kept token is one row of K and
    one of V: 2 * head_dim * kv_bytes bytes.

    A lane's projections take the longer of reading its weight slice and computing it for the
    batch, as in a roofline: ``ops_per_byte`` is the number of operations that the device does in
    the time in which it reads a byte (0: computing never counts). ``activation_passes`` counts how
    often the activations of a lane (q, k, v and output of every request, served here or not) are
    read or written outside of attention: projections, rotary embedding, append.

    ``weight_byte_cost`` and ``kv_byte_cost`` turn bytes into cost, 1.0 each unless measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    head_dim: int = Field(default=128, ge=1)
    hidden_size: int = Field(default=4096, ge=1)
    group: int = Field(default=4, ge=1)
    weight_bytes: float = Field(default=2.0, ge=0.0)
    kv_bytes: float = Field(default=2.0, gt=0.0)
    batch: float = Field(default=32.0, gt=0.0)
    weight_byte_cost: float = Field(default=1.0, ge=0.0)
    kv_byte_cost: float = Field(default=1.0, gt=0.0)
    ops_per_byte: float = Field(default=0.0, ge=0.0)
    activation_passes: float = Field(default=0.0, ge=0.0)

    @classmethod
    def for_device(cls, device: str, **sizes: Any) -> CostModel:
        """With the constants of a kind of device, ``"cpu"`` or ``"cuda"``."""
        return cls(**{**DEVICES["cpu" if device.startswith("cpu") else "cuda"], **sizes})

    @classmethod
    def for_model(cls, model: Model, device: str, batch: float) -> CostModel:
        """Of a model on a kind of device, for ``batch`` requests decoded together."""
        return cls.for_device(
            device,
            head_dim=model.head_dim,
            hidden_size=model.hidden_size,
            group=model.group_size,
            weight_bytes=model.dtype_bytes,
            kv_bytes=model.dtype_bytes,
            batch=batch,
        )

    @property
    def slice_parameters(self) -> int:
        """Weights of one lane."""
        return (2 * self.group + 2) * self.head_dim * self.hidden_size

    @property
    def slice_bytes(self) -> float:
        """Weight bytes of one lane."""
        return self.slice_parameters * self.weight_bytes

    @property
    def token_bytes(self) -> float:
        """KV bytes of one kept token of one head."""
        return 2 * self.head_dim * self.kv_bytes

    @property
    def lane_cost(self) -> float:
        """Cost of serving a head at all, per decode step: its projections and activations."""
        projections = self.slice_bytes
        if self.ops_per_byte > 0.0:
            computed = 2 * self.slice_parameters * self.batch / self.ops_per_byte
            projections = max(projections, computed)
        width = (2 * self.group + 2) * self.head_dim
        moved = self.batch * self.activation_passes * width * self.kv_bytes
        return projections * self.weight_byte_cost + moved * self.kv_byte_cost

    def head_cost(self, loads: ArrayLike) -> FloatArray:
        """Cost of all requests of each head, ``[L, H]``, from expected kept tokens ``[L, H]``."""
        tokens = np.asarray(loads, dtype=np.float64)
        return self.batch * tokens * self.token_bytes * self.kv_byte_cost

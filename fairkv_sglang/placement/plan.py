# SPDX-License-Identifier: Apache-2.0
"""The placement plan: which rank serves which head, and which share of its requests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PLAN_VERSION = 1
SHARE_TOLERANCE = 1e-6
LARGEST = 1 << 16
"""No model has more layers or heads, and no plan more ranks."""
FIGURES = (
    "token_imbalance", "step_cost", "step_lower_bound", "step_over_bound", "copies_per_layer",
    "max_copies_in_a_layer", "home_rows", "twin_bytes", "most_twin_bytes", "capacity_imbalance",
    "lane_slots", "lane_tokens",
)  # fmt: skip
"""Keys of a plan's ``info`` that others calculate with."""


class HeadShare(BaseModel):
    """One lane: a rank serves ``share`` (0 < share <= 1) of the requests of ``head``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    head: int = Field(ge=0)
    share: float = Field(gt=0.0, le=1.0 + SHARE_TOLERANCE)


def digest(data: bytes) -> str:
    """What identifies a plan file: blake2b of its bytes, 128 bit in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


LayerPlan = tuple[tuple[HeadShare, ...], ...]


class Plan(BaseModel):
    """Placement of every KV head of a model on tensor-parallel ranks.

    ``layers[l][r]`` lists the heads that rank ``r`` serves in layer ``l``, in the order in which
    the rank loads their weights. A valid plan serves every head, the shares of a head sum to 1,
    no rank serves a head twice and every rank serves at least one head in every layer (SGLang
    builds each attention layer with one head or more).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["fairkv-plan"] = "fairkv-plan"
    version: int = PLAN_VERSION
    policy: str = "unnamed"  # a plan from elsewhere need not say how it was made
    model: str | None = None
    tp_size: int = Field(ge=1, le=LARGEST)
    num_layers: int = Field(ge=1, le=LARGEST)
    num_kv_heads: int = Field(ge=1, le=LARGEST)
    layers: tuple[LayerPlan, ...]
    info: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _valid(self) -> Plan:
        if self.version != PLAN_VERSION:
            raise ValueError(
                f"plan version {self.version} is not supported; this release reads version "
                f"{PLAN_VERSION}: make the plan again with `fairkv plan`"
            )
        if len(self.layers) != self.num_layers:
            raise ValueError(f"plan has {len(self.layers)} layers, expected {self.num_layers}")
        for index, layer in enumerate(self.layers):
            self._check_layer(index, layer)
        for key in FIGURES:
            figure = self.info.get(key, 0)
            if isinstance(figure, bool) or not isinstance(figure, int | float):
                raise ValueError(f"info.{key} must be a number, got {figure!r}")
        # Goes out with the server's state, as JSON and in messages that hold 64 bits.
        if not all(abs(number) < 1 << 63 for number in _numbers(self.info)):
            raise ValueError("info holds a number that is not finite or has more than 64 bits")
        return self

    def _check_layer(self, index: int, layer: LayerPlan) -> None:
        if len(layer) != self.tp_size:
            raise ValueError(f"layer {index} has {len(layer)} ranks, expected {self.tp_size}")
        total = [0.0] * self.num_kv_heads
        for rank, lanes in enumerate(layer):
            if not lanes:
                raise ValueError(
                    f"layer {index}: rank {rank} serves no head; every rank needs at least one"
                )
            seen: set[int] = set()
            for lane in lanes:
                if lane.head >= self.num_kv_heads:
                    raise ValueError(
                        f"layer {index}, rank {rank}: head {lane.head} does not exist; heads are "
                        f"0..{self.num_kv_heads - 1}"
                    )
                if lane.head in seen:
                    raise ValueError(f"layer {index}: rank {rank} serves head {lane.head} twice")
                seen.add(lane.head)
                total[lane.head] += lane.share
        for head, share in enumerate(total):
            if abs(share - 1.0) > SHARE_TOLERANCE:
                what = "is served by no rank" if share == 0.0 else f"has shares summing to {share}"
                raise ValueError(f"layer {index}: head {head} {what}; they must sum to 1")

    # -- construction -------------------------------------------------------------------------

    @classmethod
    def from_shares(
        cls,
        shares: NDArray[np.float64],
        policy: str,
        model: str | None = None,
        info: dict[str, Any] | None = None,
    ) -> Plan:
        """Build a plan from shares ``[L, R, H]`` (0 = not served); lanes are in head order."""
        if shares.ndim != 3:
            raise ValueError(f"shares must be [layers, ranks, heads], got shape {shares.shape}")
        num_layers, tp_size, num_heads = shares.shape
        layers: list[LayerPlan] = []
        for layer in shares:
            rows: list[tuple[HeadShare, ...]] = []
            for row in layer:
                heads = np.flatnonzero(row)
                rows.append(tuple(HeadShare(head=int(h), share=float(row[h])) for h in heads))
            layers.append(tuple(rows))
        return cls(
            policy=policy,
            model=model,
            tp_size=tp_size,
            num_layers=num_layers,
            num_kv_heads=num_heads,
            layers=tuple(layers),
            info=info or {},
        )

    # -- reading ------------------------------------------------------------------------------

    def heads(self, layer: int, rank: int) -> tuple[int, ...]:
        """Heads that ``rank`` serves in ``layer``, in weight order."""
        return tuple(lane.head for lane in self.layers[layer][rank])

    def shares(self) -> NDArray[np.float64]:
        """Shares ``[L, R, H]``; 0 where a rank does not serve a head."""
        out = np.zeros((self.num_layers, self.tp_size, self.num_kv_heads))
        for index, layer in enumerate(self.layers):
            for rank, lanes in enumerate(layer):
                for lane in lanes:
                    out[index, rank, lane.head] = lane.share
        return out

    def lane_start(self, rank: int) -> NDArray[np.int64]:
        """``[L + 1]``: lanes of layer ``l`` on ``rank`` are ``lane_start[l]:lane_start[l + 1]``."""
        counts = [len(layer[rank]) for layer in self.layers]
        return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)

    def copies(self) -> list[list[tuple[int, ...]]]:
        """``[layer][head]`` -> the ranks that serve the head, ascending."""
        out: list[list[list[int]]] = [
            [[] for _ in range(self.num_kv_heads)] for _ in range(self.num_layers)
        ]
        for index, layer in enumerate(self.layers):
            for rank, lanes in enumerate(layer):
                for lane in lanes:
                    out[index][lane.head].append(rank)
        return [[tuple(ranks) for ranks in layer] for layer in out]

    def copy_counts(self) -> NDArray[np.int64]:
        """``[L]``: lanes beyond one per head, the extra weight slices of each layer."""
        lanes = [sum(len(row) for row in layer) for layer in self.layers]
        return np.asarray(lanes, dtype=np.int64) - self.num_kv_heads

    @property
    def digest(self) -> str:
        """Digest of the file that :meth:`to_file` writes."""
        return digest(self.to_json().encode())

    # -- files --------------------------------------------------------------------------------

    def to_json(self) -> str:
        """JSON with one line per layer; a lane is written as ``[head, share]``."""
        head = self.model_dump(exclude={"layers"})
        body = json.dumps(head, indent=1, allow_nan=False)[:-2]
        lines = [
            json.dumps([[[lane.head, lane.share] for lane in row] for row in layer])
            for layer in self.layers
        ]
        return body + ',\n "layers": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read :meth:`to_json`'s output. Raises ValueError with one line if it is not a plan."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not a plan: invalid JSON ({error})") from None
        if not isinstance(data, dict) or not isinstance(data.get("layers"), list):
            raise ValueError("not a plan: expected a JSON object with 'layers'; see `fairkv plan`")
        try:
            data["layers"] = [
                [[_lane(lane) for lane in row] for row in layer] for layer in data["layers"]
            ]
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            where = f"{where}: " if where else ""
            raise ValueError(f"invalid plan: {where}{first['msg']}") from None
        except TypeError:
            raise ValueError(
                "invalid plan: 'layers' must be lists of [head, share] per layer and rank"
            ) from None

    def to_file(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_file(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises ValueError that names the file if it is not a plan."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read plan {path}: {error}") from None
        try:
            return cls.from_json(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _lane(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 2:
        return {"head": value[0], "share": value[1]}
    return value


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value

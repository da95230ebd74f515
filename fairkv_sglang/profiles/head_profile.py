# SPDX-License-Identifier: Apache-2.0
"""The head profile and its own file format.

A profile file is data only, either JSON or safetensors by suffix, and says the same in both:

    {"format": "fairkv-profile", "version": 1, "model": str | null, "num_layers": L,
     "num_kv_heads": H, "share": [L lists of H numbers, mean 1.0 over all], "meta": {...}}

A head of share s is expected to keep s times the mean budget. In memory the same table is scaled to
sum to 1 (``HeadProfile.shares``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = "fairkv-profile"
VERSION = 1
# Rounded numbers are fine; a mean further off than this is a mistake.
MEAN_TOLERANCE = 0.01

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """Expected share of all kept tokens per (layer, KV head).

    Attributes:
        model: Name of the model it was measured on; None when it fits any.
        shares: Float64 [L, H], not negative, sums to 1 over all entries. Any positive scale is
            accepted by the constructor and normalised; the stored array is read-only.
        meta: Where the numbers come from (source, scorer, how measured, licence); plain JSON.

    Raises:
        ValueError: Not a table of two axes; NaN, infinite or negative numbers; nothing but zeros.
    """

    model: str | None
    shares: FloatArray
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", normalised(self.shares))

    @property
    def num_layers(self) -> int:
        return int(self.shares.shape[0])

    @property
    def num_kv_heads(self) -> int:
        return int(self.shares.shape[1])

    @property
    def relative(self) -> FloatArray:
        """[L, H], mean 1.0: times the mean budget it gives the expected tokens of each head."""
        return self.shares * self.shares.size

    def require_shape(self, num_layers: int, num_kv_heads: int) -> None:
        """Raises ValueError unless the profile has this many layers and KV heads."""
        if self.shares.shape != (num_layers, num_kv_heads):
            raise ValueError(
                f"head profile of {self.model or 'an unnamed model'} has {self.num_layers} layers "
                f"x {self.num_kv_heads} KV heads, but the model has {num_layers} x {num_kv_heads}"
            )

    def save(self, path: str | Path) -> None:
        """Writes the profile; ``.json`` and ``.safetensors`` are understood."""
        path = Path(path)
        head = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
        }
        if path.suffix == ".json":
            rows = ",\n  ".join(json.dumps(row) for row in self.relative.tolist())
            body = json.dumps(head)[:-1] + f',\n "meta": {json.dumps(self.meta)}'
            path.write_text(f'{body},\n "share": [\n  {rows}]}}\n', encoding="utf-8")
        elif path.suffix == ".safetensors":
            text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in head.items() if v}
            text["meta"] = json.dumps(self.meta)
            save_file({"share": np.ascontiguousarray(self.relative)}, path, metadata=text)
        else:
            raise ValueError(f"profile {path}: name it .json or .safetensors")

    @classmethod
    def load(cls, path: str | Path) -> HeadProfile:
        """Reads a file of FairKV's own format.

        Raises:
            ValueError: One line that names the file and what is wrong with it.
        """
        path = Path(path)
        try:
            if path.suffix == ".safetensors":
                return cls.from_dict(_read_safetensors(path))
            return cls.from_dict(read_json(path))
        except ValueError as error:
            raise ValueError(f"profile {path}: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeadProfile:
        """The profile that a decoded file describes; checks every field."""
        if data.get("format") != FORMAT:
            raise ValueError(f'"format" is {data.get("format")!r}, expected "{FORMAT}"')
        if data.get("version") != VERSION:
            raise ValueError(f"version {data.get('version')!r} is not known, expected {VERSION}")
        missing = [key for key in ("num_layers", "num_kv_heads", "share") if key not in data]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
        model, meta = data.get("model"), data.get("meta", {})
        if not (model is None or isinstance(model, str)) or not isinstance(meta, dict):
            raise ValueError('"model" must be a string or null and "meta" an object')
        share = as_table(data["share"])
        shape = (data["num_layers"], data["num_kv_heads"])
        if share.shape != shape:
            raise ValueError(
                f"share has {share.shape[0]} layers x {share.shape[1]} heads, "
                f"but the file says {shape[0]} x {shape[1]}"
            )
        shares = normalised(share)
        if abs(share.mean() - 1.0) > MEAN_TOLERANCE:
            raise ValueError(f"share has mean {share.mean():.6g}, expected mean 1.0 over all heads")
        return cls(model=model, shares=shares, meta=meta)


def uniform_profile(num_layers: int, num_kv_heads: int) -> HeadProfile:
    """The profile in which every head needs the same."""
    if num_layers < 1 or num_kv_heads < 1:
        raise ValueError(f"a profile needs layers and heads, not {num_layers} x {num_kv_heads}")
    return HeadProfile(None, np.ones((num_layers, num_kv_heads)), {"source": "uniform"})


def as_table(values: object) -> FloatArray:
    """``values`` as float64 [L, H]; ValueError if it is ragged, empty or not made of numbers."""
    try:
        table = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("the share table is ragged or holds something else than numbers") from None
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"expected a table of layers x heads, got shape {list(table.shape)}")
    return table


def normalised(values: object) -> FloatArray:
    """Read-only copy of the table scaled to sum to 1, after checking every number."""
    table = as_table(values)
    for bad, what in ((~np.isfinite(table), "not a finite number"), (table < 0, "negative")):
        if bad.any():
            layer, head = np.argwhere(bad)[0]
            raise ValueError(f"share of layer {layer}, head {head} is {what}: {table[layer, head]}")
    largest = table.max()
    if largest == 0:
        raise ValueError("all shares are zero")
    table /= largest  # so that the sum can neither overflow nor vanish
    table /= table.sum()
    table.flags.writeable = False
    return table


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError in one line for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON, truncated or corrupt ({error})") from None
    if not isinstance(data, dict):
        raise ValueError("expected a JSON object")
    return data


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            data: dict[str, Any] = dict(file.metadata() or {})
            if "share" in file.keys():  # noqa: SIM118 (not a mapping)
                data["share"] = file.get_tensor("share")
    except OSError as error:
        raise ValueError(f"cannot be read ({error})") from None
    except SafetensorError as error:
        raise ValueError(f"not valid safetensors, truncated or corrupt ({error})") from None
    try:
        for key in ("version", "num_layers", "num_kv_heads", "meta"):
            if key in data:
                data[key] = json.loads(data[key])
    except json.JSONDecodeError:
        raise ValueError(f"metadata field {key!r} is not valid JSON") from None
    return data

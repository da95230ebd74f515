# SPDX-License-Identifier: Apache-2.0
"""The sizes that the load model needs, from a model's ``config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float8_e4m3fn": 1.0}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model; ``weight_bytes`` per parameter of the attention projections."""

    num_layers: int
    num_kv_heads: int
    group: int
    head_dim: int
    hidden_size: int
    weight_bytes: float
    name: str | None = None

    @classmethod
    def from_config(cls, path: str | Path) -> ModelShape:
        """Read a Hugging Face ``config.json`` (a file or the folder that holds it).

        Raises ValueError with one line if it is unreadable or a size is missing.
        """
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read model config {file}: {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"model config {file}: expected a JSON object")
        text = data.get("text_config") or data.get("llm_config") or data
        try:
            heads = int(text["num_attention_heads"])
            hidden = int(text["hidden_size"])
            layers = int(text["num_hidden_layers"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"model config {file}: num_hidden_layers, num_attention_heads and hidden_size "
                "are needed"
            ) from None
        kv_heads = int(text.get("num_key_value_heads") or heads)
        if min(heads, hidden, layers, kv_heads) < 1 or heads % kv_heads:
            raise ValueError(
                f"model config {file}: {heads} query heads are no multiple of {kv_heads} KV heads"
            )
        name = data.get("_name_or_path") or None
        return cls(
            num_layers=layers,
            num_kv_heads=kv_heads,
            group=heads // kv_heads,
            head_dim=int(text.get("head_dim") or hidden // heads),
            hidden_size=hidden,
            weight_bytes=_weight_bytes(data, text),
            name=name,
        )


def _weight_bytes(data: dict[str, Any], text: dict[str, Any]) -> float:
    quant = data.get("quantization_config") or text.get("quantization_config")
    if isinstance(quant, dict):
        bits = quant.get("bits") or quant.get("w_bit")
        if isinstance(bits, int):
            return bits / 8
        method = str(quant.get("quant_method", ""))
        if "fp8" in method or "int8" in method:
            return 1.0
        if "4" in method:
            return 0.5
    dtype = str(text.get("dtype") or text.get("torch_dtype") or data.get("torch_dtype") or "")
    return _DTYPE_BYTES.get(dtype.removeprefix("torch."), 2.0)

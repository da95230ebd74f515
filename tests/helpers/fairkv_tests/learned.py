# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints of trained scorers, random, in the format of the published ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_kvzap(
    folder: Path, layers: int, heads: int, hidden: int, inner: int | None, seed: int = 0
) -> Path:
    """As transformers' ``save_pretrained`` leaves KVzap's model.

    Args:
        folder: Where it goes.
        layers, heads, hidden: Sizes of the model.
        inner: Width of the MLP; None: linear.
        seed: Of the random numbers.

    Returns:
        ``folder``.
    """
    config = {
        "architectures": ["KVzapModel"],
        "model_type": "kvzap",
        "input_dim": hidden,
        "output_dim": heads,
        "hidden_dim": inner,
        "n_modules": layers,
        "dtype": "float32",
    }
    make = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        parts = {"": (heads, hidden)}
        if inner is not None:
            parts = {".0": (inner, hidden), ".2": (heads, inner)}
        for part, (rows, columns) in parts.items():
            weight = torch.randn(rows, columns, generator=make) * 2 * columns**-0.5
            tensors[f"layers.{layer}{part}.weight"] = weight
            tensors[f"layers.{layer}{part}.bias"] = torch.randn(rows, generator=make)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_gates(
    layers: int, heads: int, group: int, hidden: int, dim: int = 4, sinks: int = 3, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Fast KVzip's gates, a state dictionary for each layer as they are published."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    return [
        {
            "q_proj.weight": normal(heads * group * dim, hidden),
            "q_proj.bias": normal(heads * group * dim),
            "k_proj.weight": normal(heads * dim, hidden),
            "q_norm.weight": 1 + normal(dim) / 4,
            "k_norm.weight": 1 + normal(dim) / 4,
            "k_base": normal(heads, 1, sinks, dim),
            "b": normal(heads, 1, group),
        }
        for _ in range(layers)
    ]


def write_gates(folder: Path, gates: Sequence[dict[str, Tensor]]) -> Path:
    """The same converted to safetensors; returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{i}.{name}": x for i, gate in enumerate(gates) for name, x in gate.items()}
    save_file(tensors, folder / "gates.safetensors")
    return folder


def write_weights(folder: Path, name: str, model: Any, seed: int = 0) -> Path:
    """A checkpoint of scorer ``name`` for a model (``fairkv_sglang.model.Model``).

    Returns:
        Its folder, in ``folder``.
    """
    layers, heads, hidden = model.num_layers, model.num_kv_heads, model.hidden_size
    if name == "fastkvzip":
        gates = random_gates(layers, heads, model.group_size, hidden, seed=seed)
        return write_gates(folder / name, gates)
    inner = None if seed % 2 else 10
    return write_kvzap(folder / name, layers, heads, hidden, inner, seed)

# SPDX-License-Identifier: Apache-2.0
"""A model whose decode is dominated by attention: random weights, built offline.

Throughput does not depend on what the weights are, but on where a step's time goes. Hidden size,
MLP and vocabulary are small here, so that reading the cache is most of a decode step already at
batches that a small machine holds.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file

from fairkv_sglang.placement.options import checked


class BenchModel(BaseModel):
    """Shape of a Llama with random weights; field names are the keys of ``--model``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int = Field(default=4, ge=1)
    kv_heads: int = Field(default=8, ge=1)
    group: int = Field(default=4, ge=1)
    head_dim: int = Field(default=128, ge=8)
    hidden: int = Field(default=64, ge=8)
    intermediate: int = Field(default=128, ge=8)
    vocab: int = Field(default=512, ge=64)
    context: int = Field(default=4096, ge=64)
    seed: int = 0

    @property
    def q_heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def name(self) -> str:
        """A folder name that differs for different shapes."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()
        return f"bench-{self.layers}x{self.kv_heads}-{digest[:10]}"

    def config(self) -> dict[str, object]:
        """``config.json`` of the checkpoint."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.q_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "torch_dtype": "float32",
        }


def parse_model(text: str) -> BenchModel:
    """A shape from ``"layers=4,head_dim=128"``; what is left out has its default.

    Raises:
        ValueError: in one line, for an unknown key or a value that is not a whole number.
    """
    pairs = (part.partition("=") for part in text.split(",") if part.strip())
    try:
        return checked(BenchModel, **{key.strip(): value.strip() for key, _, value in pairs})
    except ValueError as error:
        raise ValueError(f"--model: {error}") from None


def build(model: BenchModel, folder: Path) -> Path:
    """Write the checkpoint (float32 safetensors, no tokenizer) to ``folder / model.name``.

    An existing one of the same shape is reused.
    """
    path = folder / model.name
    if (path / "complete").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    save_file(_weights(model), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(model.config(), indent=1) + "\n")
    (path / "complete").touch()
    return path


def _weights(model: BenchModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(model.seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn((rows, columns), generator=generator) * columns**-0.5

    q, kv = model.q_heads * model.head_dim, model.kv_heads * model.head_dim
    tensors = {
        "model.embed_tokens.weight": matrix(model.vocab, model.hidden),
        "model.norm.weight": torch.ones(model.hidden),
        "lm_head.weight": matrix(model.vocab, model.hidden),
    }
    for layer in range(model.layers):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "input_layernorm.weight": torch.ones(model.hidden),
            at + "post_attention_layernorm.weight": torch.ones(model.hidden),
            at + "self_attn.q_proj.weight": matrix(q, model.hidden),
            at + "self_attn.k_proj.weight": matrix(kv, model.hidden),
            at + "self_attn.v_proj.weight": matrix(kv, model.hidden),
            at + "self_attn.o_proj.weight": matrix(model.hidden, q),
            at + "mlp.gate_proj.weight": matrix(model.intermediate, model.hidden),
            at + "mlp.up_proj.weight": matrix(model.intermediate, model.hidden),
            at + "mlp.down_proj.weight": matrix(model.hidden, model.intermediate),
        }
    return tensors

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with random weights: speed does not depend on what the weights are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fairkv_sglang.model import Model

KINDS = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen3ForCausalLM": "qwen3"}
Weights = dict[str, torch.Tensor]


def build(model: Model, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model (safetensors, no tokenizer) below ``folder``; one that is there is reused."""
    digest = hashlib.sha256(repr((model, dtype)).encode()).hexdigest()
    path = folder / f"{model.name.split(',')[0]}-{digest[:10]}"
    if not (path / "complete").exists():
        write(path, config(model, dtype), random_weights(model, dtype))
        (path / "complete").touch()
    return path


def write(path: Path, config: dict[str, object], weights: Weights) -> Path:
    """A checkpoint's two files."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return path


def config(model: Model, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """``config.json``."""
    return {
        "architectures": [model.architecture],
        "model_type": KINDS[model.architecture],
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_q_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def random_weights(model: Model, dtype: torch.dtype = torch.float32) -> Weights:
    """Weights that keep the size of what goes through them."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn((rows, columns), generator=generator) * columns**-0.5).to(dtype)

    hidden, mlp = model.hidden_size, model.intermediate_size
    q, kv = model.num_q_heads * model.head_dim, model.num_kv_heads * model.head_dim
    weights = {
        "model.embed_tokens.weight": matrix(model.vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": matrix(model.vocab_size, hidden),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if model.architecture == "Qwen3ForCausalLM":
        norms |= {"self_attn.q_norm": model.head_dim, "self_attn.k_norm": model.head_dim}
    matrices = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }  # fmt: skip
    for layer in range(model.num_layers):
        at = f"model.layers.{layer}."
        weights |= {f"{at}{name}.weight": torch.ones(n, dtype=dtype) for name, n in norms.items()}
        weights |= {f"{at}{name}.weight": matrix(*shape) for name, shape in matrices.items()}
    return weights

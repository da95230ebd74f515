# SPDX-License-Identifier: Apache-2.0
"""Tiny random models with a tokenizer, built offline and the same on every machine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

Architecture = Literal[
    "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "gemma3", "gpt_oss"
]

EXPERTS = 4
"""Experts of a mixture; each token goes to two."""
SLIDING_WINDOW = 40
"""Tokens that a layer with a sliding window sees, the newest one included."""
IMPLIED = ("mixtral", "phi3", "qwen2")
"""Families whose configurations have no head size: it is the hidden size over the query heads."""
BOS, EOS, PAD = 0, 1, 2
"""Ids of the special tokens."""
FIRST_BYTE = 3
"""Id of byte 0; the 256 byte tokens follow, then tokens that only the model can produce."""


@dataclass(frozen=True)
class TinyModel:
    """Shape of a random causal language model.

    Attributes:
        architecture: Which family; decides biases and q/k norms.
        layers: Number of layers.
        q_heads: Query heads, a multiple of ``kv_heads``.
        kv_heads: KV heads.
        head_dim: Width of a head.
        hidden: Width of the residual stream; not of the families in :data:`IMPLIED`.
        intermediate: Width of the MLP.
        vocab: Vocabulary, at least 259.
        context: Longest sequence.
        tied: Whether the output layer is the embedding.
        bias: Whether attention has biases where the family leaves that open (Llama).
        seed: Seed of the weights.
    """

    architecture: Architecture = "llama"
    layers: int = 2
    q_heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    hidden: int = 128
    intermediate: int = 256
    vocab: int = 512
    context: int = 4096
    tied: bool = False
    bias: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """A folder name that differs for different shapes."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.architecture}-{self.q_heads}q{self.kv_heads}kv-{digest[:10]}"


def build(model: TinyModel, folder: Path) -> Path:
    """Write the model as a Hugging Face checkpoint (float32 safetensors) with its tokenizer.

    Args:
        model: What to build.
        folder: Where; an existing checkpoint of the same shape is reused.

    Returns:
        The checkpoint's folder, ``folder / model.name``.
    """
    path = folder / model.name
    if (path / "complete").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    network = _network(model)
    _initialise(network, model.seed)
    network.save_pretrained(path, safe_serialization=True)
    _tokenizer(model.vocab).save_pretrained(path)
    (path / "complete").touch()
    return path


def _network(model: TinyModel) -> Any:
    import transformers

    shared: dict[str, Any] = dict(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.q_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab,
        max_position_embeddings=model.context,
        tie_word_embeddings=model.tied,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    if model.architecture in IMPLIED:
        shared["hidden_size"] = model.q_heads * shared.pop("head_dim")
    experts = dict(num_experts_per_tok=2)
    config: Any
    if model.architecture == "llama":
        config = transformers.LlamaConfig(attention_bias=model.bias, **shared)
    elif model.architecture == "mistral":
        config = transformers.MistralConfig(sliding_window=None, **shared)
    elif model.architecture == "mixtral":
        config = transformers.MixtralConfig(
            sliding_window=None, num_local_experts=EXPERTS, **experts, **shared
        )
    elif model.architecture == "phi3":
        config = transformers.Phi3Config(sliding_window=None, **shared)
    elif model.architecture == "qwen2":
        config = transformers.Qwen2Config(use_sliding_window=False, **shared)
    elif model.architecture == "qwen3":
        config = transformers.Qwen3Config(use_sliding_window=False, **shared)
    elif model.architecture == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            use_sliding_window=False,
            num_experts=EXPERTS,
            moe_intermediate_size=model.intermediate // 2,
            norm_topk_prob=True,
            **experts,
            **shared,
        )
    elif model.architecture == "gemma3":
        config = transformers.Gemma3TextConfig(
            query_pre_attn_scalar=2 * model.head_dim,
            **_sliding(model),
            **{**shared, "tie_word_embeddings": True},  # SGLang takes no other
        )
    elif model.architecture == "gpt_oss":
        config = transformers.GptOssConfig(
            num_local_experts=EXPERTS, swiglu_limit=7.0, **experts, **_sliding(model), **shared
        )
    else:
        names = ", ".join(get_args(Architecture))
        raise ValueError(f"architecture {model.architecture!r}: one of {names}")
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return network.eval()


def _sliding(model: TinyModel) -> dict[str, Any]:
    """Every other layer has a sliding window, the first and, of three, the last."""
    kinds = ("sliding_attention", "full_attention")
    return {
        "sliding_window": SLIDING_WINDOW,
        "layer_types": [kinds[layer % 2] for layer in range(model.layers)],
    }


def _initialise(network: Any, seed: int) -> None:
    """Weights and biases large enough that greedy outputs differ between prompts and do not get
    stuck.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(network.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.1 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            elif name.endswith("sinks"):  # SGLang holds them in bfloat16
                weight.copy_((2 + noise).bfloat16())
            else:
                weight.copy_(1.2 * noise / weight.shape[-1] ** 0.5)


def _tokenizer(vocab: int) -> Any:
    """A byte-level tokenizer without merges: one token per byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if vocab < FIRST_BYTE + 256:
        raise ValueError(f"vocab {vocab}: at least {FIRST_BYTE + 256}")
    specials = ["<s>", "</s>", "<pad>"]
    names = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [f"Ġw{index}" for index in range(len(names), vocab)]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
    )


def hugging_face_outputs(path: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations by ``transformers``, one prompt at a time, end of sequence ignored."""
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            result = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=PAD,
            )
        outputs.append(result[0, len(prompt) :].tolist())
    return outputs


def random_prompts(lengths: list[int], vocab: int, seed: int = 0) -> list[list[int]]:
    """Random token ids (no special ones), one prompt per length."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(FIRST_BYTE, vocab, (length,), generator=generator).tolist()
        for length in lengths
    ]

# SPDX-License-Identifier: Apache-2.0
"""The models that FairKV serves: one row each.

The check at start, the hooks on attention classes (``patches/models.py``) and the pages read this
table. CONTRIBUTING.md, "Add a model", says what an attention class must be like.
"""

from __future__ import annotations

from dataclasses import dataclass

_MODELS = "sglang.srt.models"


@dataclass(frozen=True)
class Architecture:
    """One model class of SGLang.

    Attributes:
        name: As in ``architectures`` of a model's ``config.json``.
        family: As people call it.
        model: Path of the model class.
        attention: Path of the class of its attention modules.
        sliding: Whether its ``layer_types`` say which layers have a sliding window.
    """

    name: str
    family: str
    model: str
    attention: str
    sliding: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            "Gemma3ForCausalLM",
            "Gemma 3 (text)",
            f"{_MODELS}.gemma3_causal.Gemma3ForCausalLM",
            f"{_MODELS}.gemma3_causal.Gemma3Attention",
            sliding=True,
        ),
        Architecture(
            "GptOssForCausalLM",
            "gpt-oss",
            f"{_MODELS}.gpt_oss.GptOssForCausalLM",
            f"{_MODELS}.gpt_oss.GptOssAttention",
            sliding=True,
        ),
        Architecture(
            "LlamaForCausalLM",
            "Llama",
            f"{_MODELS}.llama.LlamaForCausalLM",
            f"{_MODELS}.llama.LlamaAttention",
        ),
        Architecture(
            "MistralForCausalLM",
            "Mistral",
            f"{_MODELS}.mistral.MistralForCausalLM",
            f"{_MODELS}.llama.LlamaAttention",
        ),
        Architecture(
            "MixtralForCausalLM",
            "Mixtral",
            f"{_MODELS}.mixtral.MixtralForCausalLM",
            f"{_MODELS}.mixtral.MixtralAttention",
        ),
        Architecture(
            "Phi3ForCausalLM",
            "Phi-3/4",
            f"{_MODELS}.llama.Phi3ForCausalLM",
            f"{_MODELS}.llama.LlamaAttention",
        ),
        Architecture(
            "Qwen2ForCausalLM",
            "Qwen2",
            f"{_MODELS}.qwen2.Qwen2ForCausalLM",
            f"{_MODELS}.qwen2.Qwen2Attention",
        ),
        Architecture(
            "Qwen3ForCausalLM",
            "Qwen3",
            f"{_MODELS}.qwen3.Qwen3ForCausalLM",
            f"{_MODELS}.qwen3.Qwen3Attention",
        ),
        Architecture(
            "Qwen3MoeForCausalLM",
            "Qwen3-MoE",
            f"{_MODELS}.qwen3_moe.Qwen3MoeForCausalLM",
            f"{_MODELS}.qwen3_moe.Qwen3MoeAttention",
        ),
    )
}
"""Supported architectures by name."""


def attention_classes() -> tuple[str, ...]:
    """Paths of the attention classes, each once."""
    return tuple(dict.fromkeys(row.attention for row in ARCHITECTURES.values()))


def families() -> str:
    """The supported models, for a sentence."""
    return ", ".join(row.family for row in ARCHITECTURES.values())

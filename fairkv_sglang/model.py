# SPDX-License-Identifier: Apache-2.0
"""The one description of a model: what budgets, plans, checks and benchmarks need to know of it.

It is read from SGLang's model configuration, from a ``config.json``, or is one of ``PRESETS``; no
weight is touched. The device that serves it is no part of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
WITHOUT_END = 1 << 40
"""Tokens, more than any head has."""
DTYPE_BYTES = {"auto": 2, "half": 2, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4}
"""Bytes by SGLang's ``--dtype``; with ``auto`` it serves checkpoints in float32 as float16."""


@dataclass(frozen=True)
class Sliding:
    """Layers whose tokens attend to the latest ones only.

    Attributes:
        window: Tokens that a token attends to, itself included.
        layers: Their indices, ascending.
    """

    window: int
    layers: tuple[int, ...]

    def kept(self, prompt_len: int) -> int:
        """Tokens of a prompt that the one after it still attends to."""
        return min(prompt_len, self.window - 1)

    def most(self, num_layers: int) -> IntArray:
        """``[L, 1]`` most tokens that a head can ever use; without end in the other layers."""
        return np.where(self.mask(num_layers), self.window, WITHOUT_END)[:, None]

    def mask(self, num_layers: int) -> NDArray[np.bool_]:
        """``[L]``: which layers these are."""
        return np.isin(np.arange(num_layers), self.layers)


@dataclass(frozen=True)
class Model:
    """Sizes and kind of a decoder.

    Attributes:
        name: Where it comes from.
        num_layers: Number of layers.
        num_q_heads: Query heads of the whole model.
        num_kv_heads: KV heads of the whole model.
        head_dim: Width of a head.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP, or of an expert; 0 if the model does not say.
        vocab_size: Size of the vocabulary; 0 if the model does not say.
        dtype_bytes: Bytes of a weight and of a number in the KV cache.
        dtype: Name of that type, None if it is not known.
        context: Longest sequence in tokens.
        architecture: Name of the model class (``architectures.py`` lists those that are served).
        attention: SGLang's kind of attention (``MHA``, ``MLA``, ``SSM``).
        sliding_window: Attention window in tokens; None for full attention.
        sliding: Which layers have that window, if the others have none and contexts are longer.
        sinks: Whether a learnt number stands beside the logits in each softmax.
        hybrid: Whether some layers have linear attention, a state space or a convolution in place
            of a KV cache.
        quantization: SGLang's name of the method of quantised weights, None if they are not.
        quantization_config: What the checkpoint says of its quantisation, empty if it says nothing.
        multimodal: Whether the model takes images, audio or video.
        encoder_decoder: Whether the model has an encoder.
        generates: False for embedding and reward models.
    """

    name: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int = 0
    vocab_size: int = 0
    dtype_bytes: int = 2
    context: int = 1 << 20
    architecture: str = "LlamaForCausalLM"
    attention: str = "MHA"
    sliding_window: int | None = None
    sliding: Sliding | None = None
    sinks: bool = False
    hybrid: bool = False
    dtype: str | None = field(default=None, compare=False)
    quantization: str | None = None
    quantization_config: Mapping[str, Any] = field(default_factory=dict)
    multimodal: bool = False
    encoder_decoder: bool = False
    generates: bool = True

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def ring(self) -> int:
        """Tokens that a head with a sliding window holds; 0 if there are none."""
        return 0 if self.sliding is None else self.sliding.window

    @classmethod
    def from_sglang(cls, model_config: Any) -> Model:
        """From SGLang's ``ModelConfig``."""
        text = model_config.hf_text_config
        return cls(
            name=str(model_config.model_path),
            num_layers=model_config.num_hidden_layers,
            num_q_heads=model_config.num_attention_heads,
            num_kv_heads=model_config.get_total_num_kv_heads(),
            head_dim=model_config.head_dim,
            hidden_size=model_config.hidden_size,
            intermediate_size=_mlp(vars(text)),
            vocab_size=getattr(text, "vocab_size", None) or 0,
            dtype_bytes=model_config.dtype.itemsize,
            dtype=str(model_config.dtype).removeprefix("torch."),
            context=model_config.context_len,
            architecture=(model_config.hf_config.architectures or ["unknown"])[0],
            attention=model_config.attention_arch.name,
            sliding_window=model_config.sliding_window_size,
            sliding=_sliding(text, model_config.sliding_window_size, model_config.context_len),
            sinks=bool(getattr(model_config, "has_attention_sinks", False)),
            hybrid=_is_hybrid(text),
            quantization=model_config.quantization,
            quantization_config=_plain_dict(
                getattr(model_config.hf_config, "quantization_config", None)
                or getattr(model_config.hf_config, "compression_config", None)
            ),
            multimodal=bool(model_config.is_multimodal),
            encoder_decoder=bool(model_config.is_encoder_decoder),
            generates=bool(model_config.is_generation),
        )

    @classmethod
    def from_config(cls, path: str | Path, dtype: str = "auto") -> Model:
        """From a Hugging Face ``config.json`` (the file or its folder): sizes as SGLang reads them.

        Layers with a sliding window are among them. What else SGLang derives (kind of attention,
        modality) keeps its default.

        Args:
            path: File, or folder that holds it.
            dtype: A key of ``DTYPE_BYTES``.

        Raises:
            ValueError: in one line, if the file is unreadable or a size is missing or impossible.
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
            heads, hidden, layers = (
                int(text[key])
                for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
            )
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
        architecture = str((data.get("architectures") or ["unknown"])[0])
        context = int(text.get("max_position_embeddings") or cls.context)
        return cls(
            name=str(path),
            num_layers=layers,
            num_q_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=int(text.get("head_dim") or hidden // heads),
            hidden_size=hidden,
            intermediate_size=_mlp(text),
            vocab_size=int(text.get("vocab_size") or 0),
            dtype_bytes=DTYPE_BYTES[dtype],
            context=context,
            architecture=architecture,
            sliding=_sliding_of_file(text, architecture, layers, context),
        )


def _mlp(config: Mapping[str, Any]) -> int:
    return int(config.get("moe_intermediate_size") or config.get("intermediate_size") or 0)


def _sliding(config: Any, window: int | None, context: int) -> Sliding | None:
    """By ``layer_types``; None where all layers are alike or the window holds any context."""
    kinds = list(getattr(config, "layer_types", None) or [])
    layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    if window is None or window >= context or len(layers) in (0, len(kinds)):
        return None
    return Sliding(window, layers)


_FULL_EVERY = {"Gemma3ForCausalLM": 6, "GptOssForCausalLM": 2}
"""One layer of so many has no window where a configuration of the family names no layers."""


def _sliding_of_file(
    text: Mapping[str, Any], architecture: str, layers: int, context: int
) -> Sliding | None:
    """As ``transformers`` completes the file of a family with sliding windows."""
    if architecture not in _FULL_EVERY:
        return None
    every = int(text.get("sliding_window_pattern") or _FULL_EVERY[architecture])
    kinds = [f"{'sliding' if (i + 1) % every else 'full'}_attention" for i in range(layers)]
    named = SimpleNamespace(layer_types=text.get("layer_types") or kinds)
    return _sliding(named, text.get("sliding_window"), context)


def _is_hybrid(config: Any) -> bool:
    """By the names that configurations give to what such layers have.

    Qwen3-Next and Kimi Linear: ``linear_...``; Jamba, Falcon-H1, Nemotron-H, Granite 4:
    ``mamba_...``, ``ssm_...``; LFM2: layers of type ``conv``.
    """
    kinds = map(str, getattr(config, "layer_types", None) or [])
    return any(not kind.endswith("_attention") or "linear" in kind for kind in kinds) or any(
        name.startswith(("linear_", "mamba_", "ssm_")) and value is not None
        for name, value in vars(config).items()
    )


def _plain_dict(config: Any) -> dict[str, Any]:
    if config is None or isinstance(config, dict):
        return config or {}
    return dict(config.to_dict())


_PRESETS = (
    # config.json of the public checkpoints: family, layers, query and KV heads, head dimension,
    # hidden size, MLP, vocabulary, context
    ("llama-3.1-8b", "Llama", 32, 32, 8, 128, 4096, 14336, 128256, 131072),
    ("llama-3.3-70b", "Llama", 80, 64, 8, 128, 8192, 28672, 128256, 131072),
    ("mistral-small-24b", "Mistral", 40, 32, 8, 128, 5120, 32768, 131072, 32768),
    ("qwen3-0.6b", "Qwen3", 28, 16, 8, 128, 1024, 3072, 151936, 40960),
    ("tiny", "Llama", 4, 16, 8, 16, 64, 128, 256, 4096),  # for tests
)
PRESETS: dict[str, Model] = {
    name: Model(name, layers, q, kv, dim, hidden, mlp, vocab, 2, context, f"{family}ForCausalLM")
    for name, family, layers, q, kv, dim, hidden, mlp, vocab, context in _PRESETS
}
"""Models by name, for benchmarks and for planning without a checkpoint."""

# SPDX-License-Identifier: Apache-2.0
"""What the start-up checks and the plan need of a model; read from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairkv_sglang.placement.model import ModelShape


@dataclass(frozen=True)
class ModelFacts:
    """What the checks need of a model's configuration.

    Attributes:
        name: Where the model comes from.
        architecture: Name of the model class.
        layers: Number of layers.
        q_heads: Query heads of the whole model.
        kv_heads: KV heads of the whole model.
        head_dim: Width of a head.
        hidden: Width of the residual stream.
        dtype_bytes: Bytes of a weight.
        intermediate: Width of the MLP, None if the model does not say.
        context: Longest sequence in tokens.
        sliding_window: Attention window in tokens; None for full attention.
        attention: SGLang's kind of attention (``MHA``, ``MLA``, ``SSM``).
        quantization: Method of quantised weights, None if they are not.
        multimodal: Whether the model takes images, audio or video.
        encoder_decoder: Whether the model has an encoder.
        generates: False for embedding and reward models.
    """

    name: str
    architecture: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    dtype_bytes: int = 2
    intermediate: int | None = None
    context: int = 1 << 20
    sliding_window: int | None = None
    attention: str = "MHA"
    quantization: str | None = None
    multimodal: bool = False
    encoder_decoder: bool = False
    generates: bool = True

    @classmethod
    def of(cls, model_config: Any) -> ModelFacts:
        """Facts of SGLang's ``ModelConfig``."""
        text = model_config.hf_text_config
        return cls(
            name=str(model_config.model_path),
            architecture=(model_config.hf_config.architectures or ["unknown"])[0],
            layers=model_config.num_hidden_layers,
            q_heads=model_config.num_attention_heads,
            kv_heads=model_config.get_total_num_kv_heads(),
            head_dim=model_config.head_dim,
            hidden=model_config.hidden_size,
            dtype_bytes=model_config.dtype.itemsize,
            intermediate=getattr(text, "intermediate_size", None),
            context=model_config.context_len,
            sliding_window=model_config.sliding_window_size,
            attention=model_config.attention_arch.name,
            quantization=model_config.quantization,
            multimodal=bool(model_config.is_multimodal),
            encoder_decoder=bool(model_config.is_encoder_decoder),
            generates=bool(model_config.is_generation),
        )

    def shape(self, device: str) -> ModelShape:
        """The part that budgets and placement need, on a kind of device."""
        from fairkv_sglang.placement.model import ModelShape

        return ModelShape(
            name=self.name,
            num_layers=self.layers,
            num_kv_heads=self.kv_heads,
            group_size=self.q_heads // self.kv_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden,
            dtype_bytes=self.dtype_bytes,
            device=device,
        )

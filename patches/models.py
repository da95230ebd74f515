# SPDX-License-Identifier: Apache-2.0
"""Hooks on model construction and weight loading: the rank remapper."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fairkv_sglang.parallel import attention_kwargs, remap_weights
from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.runtime import get_runtime

_ATTENTION_CLASSES = (
    "sglang.srt.models.llama.LlamaAttention",
    "sglang.srt.models.qwen2.Qwen2Attention",
    "sglang.srt.models.qwen3.Qwen3Attention",
)
# MistralForCausalLM inherits both from the Llama classes.
_MODEL_CLASSES = (
    "sglang.srt.models.llama.LlamaForCausalLM",
    "sglang.srt.models.qwen2.Qwen2ForCausalLM",
    "sglang.srt.models.qwen3.Qwen3ForCausalLM",
)


def before_attention_init(module: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Build this rank's heads of the layer."""
    return (module,), attention_kwargs(kwargs, get_runtime().heads)


def after_attention_init(_: None, module: Any, **kwargs: Any) -> None:
    """The loader gets weights that are this rank's already, and the shapes must be what we meant.

    Raises:
        RuntimeError: if SGLang built other heads than the plan says.
    """
    runtime = get_runtime()
    module.qkv_proj.use_presharded_weights = True
    module.o_proj.use_presharded_weights = True
    layer = kwargs["layer_id"]
    count, shape = len(runtime.heads.heads[layer]), runtime.shape
    expected = (count, count * shape.group_size, shape.head_dim)
    built = (module.attn.tp_k_head_num, module.attn.tp_q_head_num, module.head_dim)
    if built != expected:
        raise RuntimeError(
            f"FairKV: layer {layer} was built with (KV heads, query heads, head size) {built}, "
            f"the plan needs {expected}"
        )


def before_load_weights(
    model: Any, weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pick this rank's heads out of the checkpoint; run-time weight updates come here too."""
    runtime = get_runtime()
    mine = remap_weights(weights, runtime.heads, runtime.shape.head_dim)
    return (model, mine, *args), kwargs


HOOKS: tuple[Hook, ...] = (
    *(
        Hook(
            target=f"{name}.__init__",
            kind="before",
            function=before_attention_init,
            why="a rank's attention layer has the plan's number of heads",
            since="0.5.17",
            upstream="sglang/srt/models (constructor of the attention class)",
        )
        for name in _ATTENTION_CLASSES
    ),
    *(
        Hook(
            target=f"{name}.__init__",
            kind="after",
            function=after_attention_init,
            why="weights arrive already sharded by the remapper; wrong shapes must stop the start",
            since="0.5.17",
            upstream="sglang/srt/layers/linear.py (use_presharded_weights)",
        )
        for name in _ATTENTION_CLASSES
    ),
    *(
        Hook(
            target=f"{name}.load_weights",
            kind="before",
            function=before_load_weights,
            why="each rank loads the q, k, v rows and o columns of its own heads",
            since="0.5.17",
            upstream="sglang/srt/models (load_weights)",
        )
        for name in _MODEL_CLASSES
    ),
)

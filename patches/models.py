# SPDX-License-Identifier: Apache-2.0
"""Hooks on attention modules and weights: prompts run on SGLang's module, decode on its twin."""

from __future__ import annotations

import logging
from typing import Any

import torch

from fairkv_sglang.architectures import attention_classes
from fairkv_sglang.attention.mixed import prompts_only, running_only
from fairkv_sglang.parallel.twins import TWIN, TwinWeights
from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.patches.rank import this_rank

logger = logging.getLogger(__name__)

_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_UPDATES = (
    "update_weights_from_disk",
    "load_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "end_weight_update",
)


def around_attention_forward(
    original: Any,
    module: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    forward_batch: Any,
    **embeddings: Any,
) -> torch.Tensor:
    """Prompts on SGLang's module, decode on its twin; a mixed batch is cut and both run.

    A scorer that reads hidden states gets those of the prompts first: the layer is compressed
    inside of its forward.

    ``embeddings``: Gemma 3's rotations ``[1, tokens, D]``, which come with the call, and positions
    are ``[1, tokens]`` then.
    """
    twin = getattr(module, TWIN, None)

    def run(on: Any, batch: Any) -> torch.Tensor:
        return original(on, positions, hidden_states, forward_batch=batch, **embeddings)

    if twin is None:  # this is a twin, or twins are not built yet
        return run(module, forward_batch)
    if forward_batch.forward_mode.is_decode():
        return run(twin, forward_batch)
    backend = this_rank().backend
    spans, scores = backend.spans, backend.compressor.hidden
    if scores is not None and spans.prompts:
        tokens = spans.prompt_tokens
        slots = forward_batch.out_cache_loc[:tokens]
        scores.add(module.attn.layer_id, _cut(hidden_states, tokens)[0], slots)
    if not spans.decode_rows:
        return run(module, forward_batch)
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    cut = spans.prompt_tokens
    first, second = _cut(hidden_states, cut)
    parts = (
        (module, slice(0, cut), first, prompts_only(forward_batch, spans)),
        (twin, slice(cut, None), second, running_only(forward_batch, spans, ForwardMode.DECODE)),
    )
    return torch.cat(
        [
            original(
                on,
                positions[..., tokens],
                hidden,
                forward_batch=batch,
                **{
                    name: rotations and tuple(part[:, tokens] for part in rotations)
                    for name, rotations in embeddings.items()
                },
            )
            for on, tokens, hidden, batch in parts
        ]
    )


def _cut(hidden: Any, cut: int) -> tuple[Any, Any]:
    """Hidden states before and from row ``cut`` on.

    With fp8 weights the norm before may have quantised them already and give a tuple: the rows, one
    scale for all or one for each row, and maybe a type.
    """
    if isinstance(hidden, torch.Tensor):
        return hidden[:cut], hidden[cut:]
    rows = len(hidden[0])
    parts = [
        _cut(x, cut) if isinstance(x, torch.Tensor) and x.dim() and len(x) == rows else (x, x)
        for x in hidden
    ]
    return tuple(a for a, _ in parts), tuple(b for _, b in parts)


def replace_fused_set_kv_buffer(forward_batch: Any) -> bool:
    """K and V go where the attention backend puts them, not to the pool beside the rotation."""
    return False


def after_load_model(_: None, runner: Any) -> None:
    """Weights are loaded: build the twins before memory is measured and divided."""
    from sglang.srt.distributed import get_tp_group

    rank = this_rank()
    layers = rank.model.num_layers
    modules: dict[int, Any] = {}
    for module in runner.model.modules():
        if f"{type(module).__module__}.{type(module).__qualname__}" in attention_classes():
            modules[module.attn.layer_id] = module
            # Qwen3-MoE may write K and V to SGLang's pool beside its rotary embedding, where decode
            # has no slots.
            if hasattr(module, "compatible_with_fused_kv_buffer"):
                module.compatible_with_fused_kv_buffer = False
    if sorted(modules) != list(range(layers)):
        raise RuntimeError(
            f"FairKV: found attention of layers {sorted(modules)}, the plan has {layers} layers"
        )
    twins = TwinWeights(
        [modules[layer] for layer in range(layers)],
        rank.heads,
        rank.model.head_dim,
        get_tp_group().device_group if rank.tp_size > 1 else None,
        fixed_width=rank.start.device.startswith("cuda"),
    )
    twins.build()
    if rank.scorer.reads_hidden:
        rank.gates = rank.scorer.gates(
            rank.model,
            rank.scope.layers,
            rank.heads.home,
            runner.model_config.dtype,
            torch.device(runner.device),
        )
    logger.info("FairKV: %s", twins.describe())
    rank.twins = twins


def after_weight_update(result: Any, updater: Any, *args: Any, **kwargs: Any) -> Any:
    """Twins follow their homes, also after an update that reports a failure."""
    rank = this_rank()
    if "twins" in vars(rank):
        rank.twins.refresh()
    return result


HOOKS: tuple[Hook, ...] = (
    *(
        Hook(
            target=f"{name}.forward",
            kind="around",
            function=around_attention_forward,
            why="decode runs on the lanes of the plan, prompts on SGLang's own split",
            since="0.5.17",
            upstream="sglang/srt/models (forward of the attention class)",
        )
        for name in attention_classes()
    ),
    Hook(
        target="sglang.srt.models.gpt_oss.enable_fused_set_kv_buffer",
        kind="replace",
        function=replace_fused_set_kv_buffer,
        why="gpt-oss would write K and V to SGLang's pool, where decode has no slots (CUDA)",
        since="0.5.21",
        upstream="sglang/srt/models/gpt_oss.py",
        test="tests/patches/test_models.py",
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        kind="after",
        function=after_load_model,
        why="twins are filled from the loaded weights before KV memory is measured",
        since="0.5.17",
        upstream="sglang/srt/model_executor/model_runner.py",
    ),
    *(
        Hook(
            target=f"{_UPDATER}.{name}",
            kind="after",
            function=after_weight_update,
            why="twins hold copies of weights, which an update at run time must reach",
            since="0.5.20",
            upstream="sglang/srt/model_executor/model_runner_components/weight_updater.py",
            test="tests/engine/test_weights.py",
        )
        for name in _UPDATES
    ),
)

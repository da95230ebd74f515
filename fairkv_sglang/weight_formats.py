# SPDX-License-Identifier: Apache-2.0
"""Formats of quantised weights that decode twins can be cut out of, as far as a configuration says.

Known before a weight is loaded; ``parallel/projections.py`` knows where heads are in the tensors.
"""

from __future__ import annotations

from typing import Any

from fairkv_sglang.model import Model

MARLIN = ("awq_marlin", "gptq_marlin")
"""SGLang's names of AWQ and GPTQ weights that its Marlin kernels run."""


def scaled_while_loading(model: Model) -> bool:
    """Whether SGLang quantises an unquantised checkpoint.

    Each rank then scales its own part of ``o_proj``: the columns of other ranks' heads do not go
    together with its own.
    """
    return model.quantization is not None and not model.quantization_config


def of_another_kind(model: Model) -> bool:
    """Whether attention weights are in none of the formats that can be cut."""
    if model.quantization is None:
        return False
    if model.quantization == "mxfp4":  # gpt-oss: experts alone
        kept = model.quantization_config.get("modules_to_not_convert") or []
        return not any(str(name).endswith("self_attn") for name in kept)
    if model.quantization in ("compressed-tensors", "compressed_tensors"):
        return any(
            (weights.get("type"), weights.get("num_bits")) != ("float", 8)
            or weights.get("strategy") not in ("tensor", "channel", "block")
            for weights in _groups(model)
        )
    return model.quantization not in ("fp8", *MARLIN)


def in_another_order(model: Model) -> bool:
    """Whether AWQ or GPTQ weights have their inputs sorted, or one group over all inputs."""
    config = model.quantization_config
    return model.quantization in MARLIN and (
        bool(config.get("desc_act")) or _group_size(model) <= 0
    )


def wider_than_a_head(model: Model, tp_size: int) -> bool:
    """Whether blocks or groups with one scale reach over the border of a head.

    With fewer KV heads than ranks, of a part of a head: its query heads are on several ranks.
    """
    if model.quantization is None:
        return False
    rows = model.group_size * model.head_dim // max(1, tp_size // model.num_kv_heads)
    if model.quantization in MARLIN:
        group = _group_size(model)
        # Marlin reads the scales of a single group in another order.
        return bool(model.head_dim % 64 or rows % group or rows // group < 2)
    blocks = [model.quantization_config.get("weight_block_size")]
    blocks += [weights.get("block_structure") for weights in _groups(model)]
    return any(model.head_dim % b[0] or rows % b[0] or rows % b[1] for b in blocks if b)


def with_quantised_cache(model: Model) -> bool:
    """Whether the checkpoint asks for an fp8 KV cache, by scales that it brings for it.

    SGLang then makes one where ``--kv-cache-dtype`` is ``auto`` (``mem_cache/kv_cache_dtype.py``).
    """
    config = model.quantization_config
    return bool(config.get("kv_cache_scheme") or config.get("kv_cache_quant_algo"))


def _groups(model: Model) -> list[dict[str, Any]]:
    """What compressed-tensors says of the weights, by group of layers."""
    groups = model.quantization_config.get("config_groups") or {}
    return [group.get("weights") or {} for group in groups.values()]


def _group_size(model: Model) -> int:
    config = model.quantization_config
    return int(config.get("group_size", config.get("q_group_size")) or 0)

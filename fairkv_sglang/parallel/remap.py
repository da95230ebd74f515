# SPDX-License-Identifier: Apache-2.0
"""Uneven, permuted and copied heads, without changing how SGLang computes attention.

SGLang's attention modules divide the model's head counts by the tensor-parallel size. Giving a
layer the counts ``n * tp_size`` therefore makes this rank build ``n`` heads, for any ``n``. When
the weights are loaded, each rank picks the q, k, v rows (and biases) and the o columns of its own
heads in its own order. The all-reduce behind ``o_proj`` sums every head once, because a rank
writes zeros for the requests of a copied head that another rank owns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fairkv_sglang.parallel.heads import RankHeads

_ATTENTION_WEIGHT = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.([qkvo]|qkv)_proj\.(.+)$")


def attention_kwargs(kwargs: dict[str, Any], heads: RankHeads) -> dict[str, Any]:
    """Head counts that make one attention layer build this rank's heads.

    Args:
        kwargs: Keyword arguments of the model's attention class, with ``layer_id``, ``num_heads``
            and ``num_kv_heads`` of the whole model.
        heads: This rank's heads.

    Returns:
        A copy with both counts replaced.
    """
    count = len(heads.heads[kwargs["layer_id"]])
    tp_size = heads.plan.tp_size
    return {
        **kwargs,
        "num_heads": count * heads.group_size * tp_size,
        "num_kv_heads": count * tp_size,
    }


def remap_weights(
    weights: Iterable[tuple[str, torch.Tensor]], heads: RankHeads, head_dim: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pick this rank's heads out of full checkpoint tensors; other tensors pass unchanged.

    Args:
        weights: (name, tensor) of the whole checkpoint: q ``[H*g*D, hidden]``, k and v
            ``[H*D, hidden]``, their biases without the last dimension, o ``[hidden, H*g*D]``.
        heads: This rank's heads.
        head_dim: D.

    Raises:
        ValueError: if a projection has another form than a plain weight or bias of its own (a
            quantised or fused checkpoint), which would be placed wrongly.
    """
    group = heads.group_size
    for name, tensor in weights:
        match = _ATTENTION_WEIGHT.search(name)
        if match is None:
            yield name, tensor
            continue
        layer, projection, kind = int(match[1]), match[2], match[3]
        if kind not in ("weight", "bias"):
            raise ValueError(
                f"cannot place {name}: FairKV places plain weights and biases; "
                "use an unquantised checkpoint"
            )
        if projection == "qkv":
            raise ValueError(
                f"cannot place {name}: FairKV places q, k and v apart; "
                "use a checkpoint with q_proj, k_proj and v_proj"
            )
        index = torch.tensor(heads.heads[layer], dtype=torch.long)
        if projection == "o":
            if kind == "weight":
                tensor = _take_columns(tensor, index, group * head_dim, heads, name)
            yield name, tensor
            continue
        width = group * head_dim if projection == "q" else head_dim
        yield name, _take_rows(tensor, index, width, heads, name)


def _take_rows(
    tensor: torch.Tensor, index: torch.Tensor, width: int, heads: RankHeads, name: str
) -> torch.Tensor:
    _check_size(tensor.shape[0], width, heads, name)
    blocks = tensor[:].view(heads.plan.num_kv_heads, width, *tensor.shape[1:])
    return blocks[index].reshape(-1, *tensor.shape[1:])


def _take_columns(
    tensor: torch.Tensor, index: torch.Tensor, width: int, heads: RankHeads, name: str
) -> torch.Tensor:
    _check_size(tensor.shape[1], width, heads, name)
    blocks = tensor[:].view(tensor.shape[0], heads.plan.num_kv_heads, width)
    return blocks[:, index].reshape(tensor.shape[0], -1)


def _check_size(size: int, width: int, heads: RankHeads, name: str) -> None:
    expected = heads.plan.num_kv_heads * width
    if size != expected:
        raise ValueError(
            f"{name} has {size} rows or columns of heads, the plan expects {expected} "
            f"({heads.plan.num_kv_heads} heads x {width})"
        )

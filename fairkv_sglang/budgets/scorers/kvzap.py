# SPDX-License-Identifier: Apache-2.0
"""KVzap (arXiv 2601.07891): KVzip+'s scores, predicted from hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from fairkv_sglang.budgets.checkpoints import Checkpoint
from fairkv_sglang.budgets.scorers.base import SCORERS, Gate
from fairkv_sglang.budgets.scorers.beforehand import Learned, Shapes
from fairkv_sglang.model import Model
from fairkv_sglang.registry import option


@SCORERS.register
@dataclass(frozen=True)
class KVzap(Learned):
    """What a linear map, or an MLP with one hidden layer, makes of the attention's input x:

        score[h] = (W x + b)[h]    or    (W2 gelu(W1 x + b1) + b2)[h]

    Trained on the logarithm of KVzip+'s scores, so they mean the same in all heads and layers, and
    scope ``threshold`` with a value around -4 is the paper's way to cut.

    The checkpoint is as published: ``config.json`` with ``input_dim``, ``output_dim``,
    ``hidden_dim`` (null: linear) and ``n_modules``; tensors ``layers.L.weight`` and ``.bias``, or
    ``layers.L.0`` and ``layers.L.2`` with both.

    The first product of an MLP is taken in the model's type, the last one in float32: scores in
    bfloat16 would tie. It is taken for all heads, a few rows, on every rank: a head's bits do not
    depend on which are at home.
    """

    name: ClassVar[str] = "kvzap"
    summary: ClassVar[str] = "KVzip's scores, predicted from hidden states by trained weights"
    prefix: ClassVar[str] = "layers.{}."

    window: int = option(
        128,
        "Last tokens of the prompt, always kept; a scorer that asks what attention they pay takes "
        "their queries.",
        gt=0,
    )

    def shapes(self, checkpoint: Checkpoint, model: Model) -> Shapes:
        """See the base class."""
        config, wide, heads = checkpoint.config(), model.hidden_size, model.num_kv_heads
        for key, wanted in (
            ("n_modules", model.num_layers),
            ("input_dim", wide),
            ("output_dim", heads),
        ):
            checkpoint.require(f"{key} in config.json", config.get(key), wanted)
        inner = config.get("hidden_dim")
        if inner is None:
            return {"weight": (heads, wide), "bias": (heads,)}
        return {
            "0.weight": (inner, wide),
            "0.bias": (inner,),
            "2.weight": (heads, inner),
            "2.bias": (heads,),
        }

    def gate(self, weights: Mapping[str, Tensor], heads: Sequence[int], dtype: torch.dtype) -> Gate:
        """See the base class."""
        last = "weight" if "weight" in weights else "2.weight"
        weight, bias = weights[last], weights[last.replace("weight", "bias")]
        mine = torch.tensor(list(heads), device=weight.device)
        inner = (
            [] if last == "weight" else [weights[f"0.{x}"].to(dtype) for x in ("weight", "bias")]
        )

        def score(hidden: Tensor) -> Tensor:
            x = gelu(linear(hidden, *inner)) if inner else hidden
            return linear(x.float(), weight, bias).index_select(1, mine)

        return score

# SPDX-License-Identifier: Apache-2.0
"""Fast KVzip (arXiv 2601.17668): gates, trained on KVzip's scores, on hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from fairkv_sglang.budgets.checkpoints import Checkpoint
from fairkv_sglang.budgets.scorers.base import SCORERS, Gate
from fairkv_sglang.budgets.scorers.beforehand import Learned, Shapes
from fairkv_sglang.model import Model
from fairkv_sglang.registry import option

EPSILON = 1e-6
"""Of the norms, which are Qwen3's."""


@SCORERS.register
@dataclass(frozen=True)
class FastKVzip(Learned):
    """How much the key of a narrow attention outweighs learnt sinks for its own token's queries.

    For query head j of KV head h and the attention's input x, with vectors of d numbers:

        q[j] = norm(Wq[h, j] x + bq[h, j]),   k = norm(Wk[h] x)          (RMS norm with weights)
        score = mean over j of 1 / (1 + sum over sinks s of exp(s . q[j] / sqrt(d)
                                                               - k . q[j] / sqrt(d) - b[h, j]))

    The tensors of layer L are those of the published gates, named ``L.q_proj.weight`` ``[H g d,
    hidden]`` and so on; published as a pickle, which is not read here: ``docs/budgets.md`` has the
    lines that convert it. d and the number of sinks are read from the shapes.

    Products with the hidden states are taken in the model's type, head by head, so that a head's
    bits do not depend on which are at home; the rest is float32.
    """

    name: ClassVar[str] = "fastkvzip"
    summary: ClassVar[str] = "KVzip's scores, predicted from hidden states by trained gates"
    prefix: ClassVar[str] = "{}."

    sink: int = option(4, "First tokens of the prompt, always kept.", ge=0)

    def shapes(self, checkpoint: Checkpoint, model: Model) -> Shapes:
        """See the base class."""
        wide, heads, group = model.hidden_size, model.num_kv_heads, model.group_size
        layers = {name.partition(".")[0] for name in checkpoint.names}
        checkpoint.require("the number of layers", len(layers), model.num_layers)
        (dim,) = checkpoint.shape("0.q_norm.weight")[-1:] or (0,)
        sinks = checkpoint.shape("0.k_base")[-2:-1] or (0,)
        return {
            "q_proj.weight": (heads * group * dim, wide),
            "q_proj.bias": (heads * group * dim,),
            "k_proj.weight": (heads * dim, wide),
            "q_norm.weight": (dim,),
            "k_norm.weight": (dim,),
            "k_base": (heads, 1, *sinks, dim),
            "b": (heads, 1, group),
        }

    def gate(self, weights: Mapping[str, Tensor], heads: Sequence[int], dtype: torch.dtype) -> Gate:
        """See the base class."""
        group, dim = weights["b"].shape[-1], len(weights["q_norm.weight"])
        wide = weights["k_proj.weight"].shape[1]
        rows = [
            weights[name].view(-1, size, wide)[list(heads)]
            for name, size in (("q_proj.weight", group * dim), ("k_proj.weight", dim))
        ]
        both = torch.cat(rows, dim=1).to(dtype)  # [n, (g + 1) d, hidden]
        norms = torch.stack([*[weights["q_norm.weight"]] * group, weights["k_norm.weight"]])
        bias = weights["q_proj.bias"].view(-1, group, dim)[list(heads)]
        sinks = weights["k_base"][list(heads), 0]  # [n, sinks, d]
        offset = weights["b"][list(heads), 0]  # [n, g]

        def score_head(hidden: Tensor, i: int) -> Tensor:
            found = linear(hidden, both[i]).float().view(-1, group + 1, dim)
            found[:, :group] += bias[i]
            found = found * (found.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * norms
            q, k = found[:, :group], found[:, group]
            own = (q @ k[..., None])[..., 0] * dim**-0.5 + offset[i]  # [T, g]
            others = torch.logsumexp(q @ sinks[i].T * dim**-0.5, dim=-1)
            score: Tensor = (own - others).sigmoid().mean(dim=1)
            return score

        return lambda hidden: torch.stack([score_head(hidden, i) for i in range(len(both))], dim=1)

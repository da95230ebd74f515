# SPDX-License-Identifier: Apache-2.0
"""An attention module as SGLang builds it, small enough to compare every weight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fairkv_sglang.placement.homes import Homes

DIM, HIDDEN = 4, 12


class Projection(nn.Module):
    """Weight ``[out, in]`` and maybe a bias, as SGLang's parallel linear layers have them."""

    def __init__(self, rows: int, columns: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((rows, columns), torch.nan), requires_grad=False)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.full((rows,), torch.nan), requires_grad=False)


class Attention(nn.Module):
    """SGLang's rule of counts: those of the model, divided by the number of ranks."""

    tp_size = 1  # of the process; one class for each number of ranks

    def __init__(
        self,
        *,
        layer_id: int,
        num_heads: int,
        num_kv_heads: int,
        bias: bool = False,
        out_bias: bool = False,
        q_norm: bool = False,
    ) -> None:
        super().__init__()
        assert num_heads % self.tp_size == 0
        assert not max(num_kv_heads, self.tp_size) % min(num_kv_heads, self.tp_size)
        self.head_dim = DIM
        self.num_heads = num_heads // self.tp_size
        self.num_kv_heads = max(1, num_kv_heads // self.tp_size)
        self.q_size, self.kv_size = self.num_heads * DIM, self.num_kv_heads * DIM
        self.qkv_proj = Projection(self.q_size + 2 * self.kv_size, HIDDEN, bias)
        self.o_proj = Projection(HIDDEN, self.q_size, out_bias)
        self.attn = nn.Module()
        self.attn.layer_id = layer_id
        self.attn.tp_q_head_num, self.attn.tp_k_head_num = self.num_heads, self.num_kv_heads
        if q_norm:
            self.q_norm, self.k_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.rotary_emb = nn.Module()


def class_of(tp_size: int) -> type[Attention]:
    return type("Attention", (Attention,), {"tp_size": tp_size})


class Reference:
    """Full weights of one layer, and what any list of whole heads has of them."""

    def __init__(
        self, heads: int, group: int, bias: bool, out_bias: bool, seed: int, dtype: torch.dtype
    ) -> None:
        self.heads, self.group = heads, group
        make = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=make).to(dtype)

        # [head, rows of one head, ...]
        self.q = random(heads, group * DIM, HIDDEN)
        self.k, self.v = random(heads, DIM, HIDDEN), random(heads, DIM, HIDDEN)
        self.o = random(HIDDEN, heads, group * DIM)
        self.biases = None
        if bias:
            self.biases = (random(heads, group * DIM), random(heads, DIM), random(heads, DIM))
        self.out_bias = random(HIDDEN) if out_bias else None

    def state(self, heads: list[int], queries: slice = slice(None)) -> SimpleNamespace:
        """Weights of ``heads`` in this order; ``queries`` are the query rows of each."""

        def rows(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            q, k, v = (part[heads] for part in parts)
            return torch.cat([q[:, queries].flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)])

        return SimpleNamespace(
            qkv=rows((self.q, self.k, self.v)),
            o=self.o[:, heads][:, :, queries].flatten(1),
            bias=None if self.biases is None else rows(self.biases),
            out_bias=self.out_bias,
        )

    def load(self, module: Attention, rank: int) -> None:
        """What SGLang loads on ``rank``."""
        homes = Homes(self.heads, module.tp_size)
        mine = list(homes.heads(rank))
        part = self.group * DIM // homes.replicas
        first = homes.ranks(mine[0]).index(rank) * part
        put(module, self.state(mine, slice(first, first + part)))


def put(module: Attention, state: SimpleNamespace) -> None:
    for current, new in pairs(module, state):
        assert (current is None) == (new is None)
        if current is not None:
            current.data.copy_(new.view(current.shape))


def pairs(module: Any, state: SimpleNamespace) -> list[tuple[Any, Any]]:
    """Each weight of a module beside the one that it should be."""
    mine, wanted = vars(weights_of(module)), vars(state)
    return [(mine[name], wanted[name]) for name in mine]


def weights_of(module: Any) -> SimpleNamespace:
    return SimpleNamespace(
        qkv=module.qkv_proj.weight,
        o=module.o_proj.weight,
        bias=module.qkv_proj.bias,
        out_bias=module.o_proj.bias,
    )


def attention(x: Tensor, state: SimpleNamespace, group: int, served: np.ndarray) -> Tensor:
    """Causal attention of whole heads without positions; ``served`` switches heads off."""
    qkv = x @ state.qkv.T + (0 if state.bias is None else state.bias)
    n = len(served)
    q, k, v = qkv.split([n * group * DIM, n * DIM, n * DIM], dim=1)
    q = q.view(len(x), n, group, DIM)
    k, v = k.view(len(x), n, DIM), v.view(len(x), n, DIM)
    logits = torch.einsum("tngd,snd->ngts", q, k) * DIM**-0.5
    hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    out = torch.einsum("ngts,snd->tngd", logits.masked_fill(hidden, -torch.inf).softmax(-1), v)
    out = out * torch.from_numpy(served)[None, :, None, None]
    return out.reshape(len(x), -1) @ state.o.T

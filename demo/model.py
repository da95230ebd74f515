# SPDX-License-Identifier: Apache-2.0
"""A small Llama written for fast training on one CPU core.

It computes what ``transformers.LlamaForCausalLM`` computes (RMSNorm, rotary positions on split
halves, grouped-query attention, SwiGLU) but with fused projections, with logits only where a loss
is taken and with explicit position ids per row, so that a short training sequence can carry the
relative distances of a long prompt.  ``to_hf_state`` gives the weights under Hugging Face's names.

Shapes: B rows, T tokens, D hidden size, H query heads, G KV heads, C head_dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Up to this row length plain matrix products train faster than the fused kernel on a CPU: its
#: backward pass is slow for short rows, while plain products need T x T memory.
EAGER_TOKENS = 512


#: Attention up to this many positions back is not far, nor is attention to the first tokens,
#: where idle heads may rest.
LOCAL_SPAN, SINK_TOKENS = 48, 2
#: Correlation of a head's initial query weights with its key weights, first and later layers.
AGREEMENT_FIRST, AGREEMENT = 0.7, 0.5


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of the demo model; they become the fields of ``config.json``."""

    vocab_size: int
    hidden_size: int = 192
    layers: int = 4
    query_heads: int = 16
    kv_heads: int = 8
    head_dim: int = 32
    mlp_size: int = 256
    rope_theta: float = 100_000.0
    max_positions: int = 4096
    norm_eps: float = 1e-6


class RmsNorm(nn.Module):
    """Root-mean-square normalisation over the last axis with a learned gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., D]; same shape out."""
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles for ``positions`` [B, T]; each is [B, 1, T, C]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angle = positions[..., None].float() * theta**-exponent
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to ``x`` [B, heads, T, C], pairing channel c with c + C/2."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, far: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of ``q`` [B, H, T, C] over ``k`` and ``v`` [B, G, T, C]: [B, H, T, C].

    Where ``far`` [B, T, T] says which keys are far from which queries, the second result is each
    KV head's mean attention to far keys [G], 0 to 1.

    The query heads of a group are stacked along the token axis, so that keys and values are
    used as they are.
    """
    rows, heads, tokens, width = q.shape
    groups = k.shape[1]
    k, v = (x.reshape(rows * groups, tokens, width) for x in (k, v))
    q = q.reshape(rows * groups, -1, width)
    mask = torch.full((tokens, tokens), -torch.inf).triu_(1).repeat(heads // groups, 1)
    scores = torch.baddbmm(mask[None].to(q.dtype), q, k.transpose(1, 2), alpha=width**-0.5)
    weights = scores.softmax(dim=-1)
    mass = None
    if far is not None:
        shape = (rows, groups, heads // groups, tokens, tokens)
        mass = (weights.view(shape) * far[:, None, None]).sum(dim=-1).mean(dim=(0, 2, 3))
    return torch.bmm(weights.to(v.dtype), v).view(rows, heads, tokens, width), mass


class Attention(nn.Module):
    """Causal grouped-query self-attention with one fused query/key/value projection."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.size = size
        self.q_width = size.query_heads * size.head_dim
        self.kv_width = size.kv_heads * size.head_dim
        self.qkv = nn.Linear(size.hidden_size, self.q_width + 2 * self.kv_width, bias=False)
        self.out = nn.Linear(self.q_width, size.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, far: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over ``x`` [B, T, D]; returns [B, T, D] and the far mass [G] if wanted."""
        mass = None
        rows, tokens, _ = x.shape
        size = self.size
        q, k, v = self.qkv(x).split([self.q_width, self.kv_width, self.kv_width], dim=-1)
        q = rotate(q.view(rows, tokens, size.query_heads, -1).transpose(1, 2), cos, sin)
        k = rotate(k.view(rows, tokens, size.kv_heads, -1).transpose(1, 2), cos, sin)
        v = v.view(rows, tokens, size.kv_heads, -1).transpose(1, 2)
        if tokens <= EAGER_TOKENS or far is not None:
            mixed, mass = eager_attention(q, k, v, far)
        else:
            # Expanded by hand: the fused CPU kernel is only chosen for equal head counts.
            group = size.query_heads // size.kv_heads
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(rows, tokens, self.q_width)), mass


class Block(nn.Module):
    """One pre-norm transformer layer: attention, then a SwiGLU MLP."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(size.hidden_size, size.norm_eps)
        self.attention = Attention(size)
        self.mlp_norm = RmsNorm(size.hidden_size, size.norm_eps)
        self.gate_up = nn.Linear(size.hidden_size, 2 * size.mlp_size, bias=False)
        self.down = nn.Linear(size.mlp_size, size.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, far: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Transform ``x`` [B, T, D]; the same shape out, and the attention's far mass [G]."""
        mixed, mass = self.attention(self.attention_norm(x), cos, sin, far)
        x = x + mixed
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up), mass


class RecallModel(nn.Module):
    """The demo language model; embeddings are shared with the output, which makes copying easy."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Embedding(size.vocab_size, size.hidden_size)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = RmsNorm(size.hidden_size, size.norm_eps)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights, with a structure that shortens the plateau before retrieval appears.

        - Unit-variance activations; the usual 0.02 leaves so narrow a model's attention flat.
        - A vector common to all embeddings, so that keys and queries have a constant part on
          which the rotary positions act.
        - Queries that agree in part with their keys, so that heads begin by looking for similar
          content.  In the first layer they are turned by 0 to 3 positions, so that heads begin
          by looking a few tokens back.
        - Output weights that agree in part with the value weights, so that heads begin by
          copying what they look at.
        """
        size = self.size
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        self.embed.weight.normal_(std=0.2).add_(0.2 * torch.randn(size.hidden_size))
        # Brings the first logits, products of normalised states and embeddings, down to about 1.
        self.norm.weight.fill_(0.3)
        group = size.query_heads // size.kv_heads
        for layer, block in enumerate(self.blocks):
            attention = block.attention
            queries, keys, values = attention.qkv.weight.split(
                [attention.q_width, attention.kv_width, attention.kv_width]
            )
            copied = values.view(size.kv_heads, 1, size.head_dim, -1)
            copied = copied.expand(-1, group, -1, -1).reshape(attention.q_width, -1).T
            copied = copied * (size.hidden_size / attention.q_width) ** 0.5
            attention.out.weight.mul_((1 - AGREEMENT**2) ** 0.5).add_(AGREEMENT * copied)
            for linear in (attention.out, block.down):
                linear.weight.mul_(0.4 * (2 * size.layers) ** -0.5)
            offset = torch.arange(size.kv_heads) % 4 if layer == 0 else torch.zeros(size.kv_heads)
            cos, sin = rotary_angles(-offset[None], size.head_dim, size.rope_theta)
            # Heads in the place of tokens: [D, 1, G, C] is turned by each head's own offset.
            turned = rotate(keys.T.reshape(-1, 1, size.kv_heads, size.head_dim), cos, sin)
            turned = turned.reshape(-1, size.kv_heads, 1, size.head_dim)
            turned = turned.expand(-1, -1, group, -1).reshape(size.hidden_size, -1).T
            agree = AGREEMENT_FIRST if layer == 0 else AGREEMENT
            queries.mul_((1 - agree**2) ** 0.5).add_(agree * turned)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        where: Tensor | None = None,
        far_price: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Logits for ``ids`` [B, T] at ``positions`` [B, T], and the price of far attention.

        ``where`` is a boolean mask [B, T] of N tokens whose logits are wanted; they are [N, V] in
        row-major order, or [B, T, V] when ``where`` is None.

        The price (a scalar, part of the loss) is ``far_price`` times each KV head's mean attention
        to keys more than ``LOCAL_SPAN`` positions back, times the head's index over the highest
        index: the first heads of a layer look far for nothing, the last ones pay the full price.
        """
        size = self.size
        cos, sin = rotary_angles(positions, size.head_dim, size.rope_theta)
        far = None
        price = torch.zeros(())
        if far_price:
            far = positions[:, :, None] - positions[:, None, :] > LOCAL_SPAN
            far[:, :, :SINK_TOKENS] = False
        rising = torch.linspace(0.0, far_price, size.kv_heads)
        x = self.embed(ids)
        for block in self.blocks:
            x, mass = block(x, cos, sin, far)
            if mass is not None:
                price = price + (mass.float() * rising).sum()
        if where is not None:
            x = x[where]
        return functional.linear(self.norm(x), self.embed.weight), price

    def to_hf_state(self) -> dict[str, Tensor]:
        """Weights by the names of ``transformers.LlamaForCausalLM``, fused matrices split."""
        state = {
            "model.embed_tokens.weight": self.embed.weight,
            "model.norm.weight": self.norm.weight,
        }
        for index, block in enumerate(self.blocks):
            attention = block.attention
            widths = [attention.q_width, attention.kv_width, attention.kv_width]
            q, k, v = attention.qkv.weight.split(widths)
            gate, up = block.gate_up.weight.chunk(2)
            parts = {
                "input_layernorm": block.attention_norm.weight,
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.o_proj": attention.out.weight,
                "post_attention_layernorm": block.mlp_norm.weight,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": block.down.weight,
            }
            for name, tensor in parts.items():
                state[f"model.layers.{index}.{name}.weight"] = tensor
        return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}

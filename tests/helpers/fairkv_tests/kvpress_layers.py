# SPDX-License-Identifier: Apache-2.0
"""Attention layers of a transformers model, and what kvpress and the package keep there."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fairkv_sglang.budgets import PromptTensors, Rope, make_scorer, pick

DIM, HIDDEN, LAYERS, WINDOW, VOCABULARY = 16, 96, 2, 12, 400


@dataclass
class Layer:
    """Attention of one layer to a prompt: what kvpress's presses get."""

    module: Any
    hidden: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    keys: Tensor  # [1, H, N, D]
    values: Tensor
    attention: Tensor  # [1, Hq, N, N]
    index: int

    @property
    def dim(self) -> int:
        return self.keys.shape[3]

    @property
    def queries(self) -> Tensor:
        """[1, Hq, N, D], rotated."""
        return turned_queries(self.module, self.hidden, self.position_embeddings)

    def score(self, press: Any, attention: Tensor | None = None) -> Tensor:
        """[H, N] of a press."""
        return press.score(
            self.module, self.hidden, self.keys.clone(), self.values, attention,
            {"position_embeddings": self.position_embeddings},
        )[0]  # fmt: skip

    def ours(self, name: str, **options: Any) -> tuple[Any, Tensor]:
        """Scorer, and scores [H, N - window] of the prompt in two chunks."""
        scorer = make_scorer(name, **{"window": WINDOW, **options})
        heads, total = self.keys.shape[1], self.keys.shape[2]
        q = self.queries[0].transpose(0, 1).reshape(total, heads, -1, self.dim)
        k, v = self.keys[0].transpose(0, 1), self.values[0].transpose(0, 1)
        positions, scale = torch.arange(total + 600)[None], self.dim**-0.5
        cos, sin = self.module.rotary_emb(self.hidden, positions)
        table = torch.cat([cos[0, :, : self.dim // 2], sin[0, :, : self.dim // 2]], dim=1)
        prompt = PromptTensors(
            q[-scorer.window :], k, scale, v, self.index, range(heads), Rope(lambda: table)
        )
        seen = None
        for start, end in ((0, 100), (100, total)) if scorer.observes else ():
            part = PromptTensors(q[start:end], k[:end], scale, rope=prompt.rope)
            seen = scorer.observe(seen, part)
        scores = scorer.score_prompt(
            PromptTensors(prompt.q, k, prompt.scale, v, self.index, range(heads), prompt.rope, seen)
        )
        return scorer, scorer.combine(scores) if scorer.spans_heads else scores

    def head(self, i: int) -> Layer:
        """KV head i with its query heads as a layer of its own."""
        group = self.attention.shape[1] // self.keys.shape[1]

        def part(layer: Any, heads: int) -> Any:
            return lambda x: layer(x)[..., i * heads * self.dim : (i + 1) * heads * self.dim]

        module = SimpleNamespace(
            config=SimpleNamespace(num_attention_heads=group, num_key_value_heads=1),
            head_dim=self.dim,
            q_proj=part(self.module.q_proj, group),
            k_proj=part(self.module.k_proj, 1),
            rotary_emb=self.module.rotary_emb,
        )
        one = slice(i, i + 1)
        return Layer(
            module, self.hidden, self.position_embeddings, self.keys[:, one], self.values[:, one],
            self.attention[:, i * group : (i + 1) * group], self.index,
        )  # fmt: skip


def turned_queries(module: Any, hidden: Tensor, position_embeddings: Any) -> Tensor:
    """[1, Hq, T, D] of an attention module, rotated."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q = module.q_proj(hidden).view(1, hidden.shape[1], -1, module.head_dim).transpose(1, 2)
    return apply_rotary_pos_emb(q, q, *position_embeddings)[0]


def random_model(split: tuple[int, int], seed: int = 0, attention: str = "eager") -> Any:
    """A Llama with random weights: KV heads, query heads of each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads, group = split
    config = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=heads * group, num_key_value_heads=heads,
        head_dim=DIM, num_hidden_layers=LAYERS, intermediate_size=64, vocab_size=VOCABULARY,
        attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.mul_(8)  # attention that is not even
    return model


def layers(split: tuple[int, int], total: int, seed: int = 0) -> list[Layer]:
    """Layers of a random Llama that reads a random prompt."""
    model = random_model(split, seed)
    # No token twice: their keys would differ by the rotation alone, and norms and leverage tie.
    return read(model, torch.randperm(VOCABULARY)[:total])


@torch.no_grad()
def read(model: Any, prompt: Tensor) -> list[Layer]:
    """Layers of a model with eager attention that reads a prompt ``[N]``."""
    found: list[Layer] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        none = torch.empty(0)
        where = kwargs["position_embeddings"]
        found.append(Layer(module, kwargs["hidden_states"], where, none, none, none, len(found)))

    hooks = [
        layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
        for layer in model.model.layers
    ]
    output = model.model(prompt[None], use_cache=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    for layer, cached, attention in zip(
        found, output.past_key_values.layers, output.attentions, strict=True
    ):
        layer.module.rotary_emb = model.model.rotary_emb
        layer.keys, layer.values, layer.attention = cached.keys, cached.values, attention
    return found


def kept_by_them(scores: Tensor, budget: int, window: int = WINDOW) -> list[set[int]]:
    """kvpress's cut through its scores, with a window that is always kept as its SnapKV has it."""
    scores = scores.clone()
    scores[:, len(scores[0]) - window :] = torch.inf
    return [set(row) for row in scores.topk(budget, dim=1).indices.tolist()]


def kept_by_us(scores: Tensor, budget: int, total: int) -> list[set[int]]:
    counts = torch.full((len(scores),), budget)
    return [set(row) for row in pick(scores, counts, total).indices.tolist()]


# Ours with options; kvpress's press with the same ones.
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "keydiff": ("keydiff", {}, "KeyDiffPress", {}),
    "knorm": ("knorm", {}, "KnormPress", {}),
    "tova": ("tova", {}, "TOVAPress", {}),
    "leverage": ("leverage", {"sketch": 10}, "LeverageScorePress", {"sketch_dimension": 10}),
    "snapkv": (
        "snapkv", {"pooling": "avg", "kernel_size": 5},
        "SnapKVPress", {"window_size": WINDOW, "kernel_size": 5},
    ),
    "expected_attention": ("expected_attention", {}, "ExpectedAttentionPress", {}),
    "expected_attention 2": (
        "expected_attention", {"sink": 7, "future": 30, "epsilon": 0.01},
        "ExpectedAttentionPress", {"n_sink": 7, "n_future_positions": 30, "epsilon": 0.01},
    ),
    "h2o": ("h2o", {"accumulation": "mean"}, "ObservedAttentionPress", {}),
}  # fmt: skip

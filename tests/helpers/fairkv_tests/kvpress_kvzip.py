# SPDX-License-Identifier: Apache-2.0
"""KVzip of kvpress and the package's on one transformers model, each with its own passes."""

from __future__ import annotations

import copy
from array import array
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fairkv_sglang.budgets import BudgetSpec, make_scope, make_scorer, pick
from fairkv_sglang.budgets.repeats import PassPart, wording_of
from fairkv_sglang.budgets.scorers import Scorer
from fairkv_sglang.memory.contexts import Context
from fairkv_tests.kvpress_layers import VOCABULARY, WINDOW, turned_queries

Kept = list[set[tuple[int, int]]]
"""Of each layer heads and positions."""


class Letters:
    """A tokenizer whose tokens are letters."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def encode(self, text: str, return_tensors: str | None = None, **_: Any) -> Any:
        ids = [ord(letter) % VOCABULARY for letter in text]
        return ids if return_tensors is None else torch.tensor([ids], dtype=torch.int64)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return str(self.chat_template).format(messages[0]["content"])


@torch.no_grad()
def scores_and_kept_by_press(
    kvpress: Any, model: Any, tokenizer: Any, prompt: Tensor, ratio: float, options: dict[str, int]
) -> tuple[list[Tensor], Kept]:
    """What the press gives and keeps in each layer, with a window that it is told to keep."""
    from transformers import DynamicCache

    press = kvpress.KVzipPress(
        1 - ratio, layerwise=True, n_sink=options["sink"], chunk_size=options["chunk"]
    )
    cut, scores = press.compress_post, []

    def windowed(model: Any) -> None:
        press.score_val[..., len(prompt) - WINDOW :] = torch.inf
        cut(model)
        scores.extend(table[0] for table in press.score_val)

    press.compress_post = windowed
    loader = mock.patch(
        "kvpress.presses.kvzip_press.AutoTokenizer.from_pretrained", lambda name: tokenizer
    )
    with loader, press(model):
        model.model(input_ids=prompt[None], past_key_values=DynamicCache())
    heads = model.config.num_key_value_heads
    everything = {(head, token) for head in range(heads) for token in range(len(prompt))}
    kept = []
    for layer in model.model.layers:
        _, head, token = layer.self_attn.masked_key_indices
        layer.self_attn.masked_key_indices = None
        kept.append(everything - set(zip(head.tolist(), token.tolist(), strict=True)))
    return scores, kept


@torch.no_grad()
def kept_by_scorer(
    model: Any, tokenizer: Any, prompt: Tensor, ratio: float, options: dict[str, int]
) -> Kept:
    """What the package keeps with scope ``layer`` and no floor."""
    scorer = make_scorer("kvzip", window=WINDOW, **options)
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    scope = make_scope("layer", BudgetSpec(ratio=ratio), layers, heads, scorer, floor_alpha=0.0)
    kept = []
    for layer, scores in enumerate(repeated(model, tokenizer, prompt, scorer)):
        scores = scores[:, : len(prompt) - WINDOW].clone()
        scores[:, : scorer.sink] = 1e30
        counts = scope.counts(layer, range(heads), scores, len(prompt))
        rows = pick(scores, counts, len(prompt)).indices.tolist()
        kept.append({(head, t) for head, row in enumerate(rows) for t in row if t >= 0})
    return kept


@torch.no_grad()
def repeated(model: Any, tokenizer: Any, prompt: Tensor, scorer: Scorer) -> list[Tensor]:
    """float32 [H, N] of each layer, by passes in two parts."""
    from transformers import DynamicCache

    cache, wording = DynamicCache(), wording_of(tokenizer)
    model.model(input_ids=prompt[None], past_key_values=cache)
    total, scale = len(prompt), model.model.layers[0].self_attn.head_dim ** -0.5
    tokens = array("q", prompt.tolist())
    context = Context(tokens, wording.chunks(tokens, scorer.chunk))
    heads, layers = model.config.num_key_value_heads, len(model.model.layers)
    scores = [torch.zeros(heads, total) for _ in range(layers)]
    while not context.complete:
        repeat = context.next(wording)
        behind = torch.tensor(repeat.tokens.tolist())
        passed, queries = copy.deepcopy(cache), []

        def keep(module: Any, args: Any, kwargs: Any, queries: list[Tensor] = queries) -> None:
            q = turned_queries(module, kwargs["hidden_states"], kwargs["position_embeddings"])
            queries.append(q[0].transpose(0, 1))

        hooks = [
            layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
            for layer in model.model.layers
        ]
        model.model(input_ids=behind[None], past_key_values=passed)
        for hook in hooks:
            hook.remove()
        sinks, half = min(scorer.sink, repeat.start), 1 + len(behind) // 2
        for layer in range(layers):
            q = queries[layer].reshape(len(behind), heads, -1, queries[layer].shape[-1])
            k = passed.layers[layer].keys[0].transpose(0, 1)
            seen = None
            for first, end in ((0, half), (half, len(behind))):
                own = k[total : total + end]
                keys = torch.cat([k[:sinks], k[repeat.start : repeat.end], own])
                part = PassPart(
                    q[first:end], keys, sinks, repeat.end - repeat.start, scale, end == len(behind)
                )
                seen = scorer.attend(seen, part)
            assert seen is not None
            scores[layer][:, repeat.start : repeat.end] = seen.most
        context.done += 1
    return scores

# SPDX-License-Identifier: Apache-2.0
"""Trained scorers keep the sets that kvpress's presses keep, by the same checkpoint files of random
weights, saved or loaded by kvpress's own classes; and so do DuoAttention's gates.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fairkv_sglang.budgets import BudgetSpec, PromptTensors, make_scope, make_scorer, pick
from fairkv_sglang.model import Model
from fairkv_sglang.profiles import read_profile
from fairkv_tests.kvpress_layers import DIM, HIDDEN, LAYERS, WINDOW, Layer, layers
from fairkv_tests.learned import random_gates, write_gates

SPLITS = {"2 x 3": (2, 3), "6 x 1": (6, 1), "1 x 6": (1, 6)}
TOTAL = 290
Kept = set[tuple[int, int, int]]
"""Layer, head, position."""


def scores_of(
    name: str, found: list[Layer], heads: int, group: int, **options: Any
) -> list[Tensor]:
    """Ours, float32 [H, N - window] of each layer."""
    scorer = make_scorer(name, **options)
    model = Model("random", LAYERS, heads * group, heads, DIM, HIDDEN)
    scorer.check(model)
    gates = scorer.gates(model, range(LAYERS), range(heads), torch.float32, torch.device("cpu"))
    result = []
    for number, layer in enumerate(found):
        seen = gates[number](layer.hidden[0]).T
        k = layer.keys[0].transpose(0, 1)
        result.append(scorer.score_prompt(PromptTensors(None, k, 1.0, seen=seen)))
    return result


def kept_by_us(scope: str, scores: list[Tensor], scorer: Any, **options: Any) -> Kept:
    """With no floor."""
    heads, spec = len(scores[0]), BudgetSpec(ratio=options.pop("ratio"))
    made = make_scope(scope, spec, LAYERS, heads, scorer, floor_alpha=0.0, **options)
    table = [torch.cat(scores)] if made.spans_layers else scores
    kept = set()
    for number, rows in enumerate(table):
        counts = made.counts(number, range(len(rows)), rows, TOTAL)
        for row, positions in enumerate(pick(rows, counts, TOTAL).indices.tolist()):
            layer, head = divmod(number * len(rows) + row, heads)
            kept |= {(layer, head, t) for t in positions if t >= 0}
    return kept


def kept_by_them(modules: list[Any], heads: int) -> Kept:
    """What the press has not masked."""
    kept = {(i, h, t) for i in range(LAYERS) for h in range(heads) for t in range(TOTAL)}
    for i, module in enumerate(modules):
        _, head, token = module.masked_key_indices or ((), torch.empty(0), torch.empty(0))
        module.masked_key_indices = None
        kept -= {(i, h, t) for h, t in zip(head.tolist(), token.tolist(), strict=True)}
    return kept


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("inner", [None, 24], ids=["linear", "mlp"])
@torch.no_grad()
def test_kvzap(kvpress: Any, split: tuple[int, int], inner: int | None, tmp_path: Path) -> None:
    """The best of a layer's heads, and all above a threshold as DMSPress has it."""
    from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel

    heads, group = split
    torch.manual_seed(heads)
    sizes = {"input_dim": HIDDEN, "output_dim": heads, "n_modules": LAYERS, "hidden_dim": inner}
    made = KVzapModel(KVzapConfig(**sizes))
    for parameter in made.parameters():  # scores that differ from token to token
        torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    made.save_pretrained(tmp_path)
    press = kvpress.KVzapPress(model_type="linear" if inner is None else "mlp")
    press.kvzap_model = KVzapModel.from_pretrained(tmp_path)
    found = layers(split, TOTAL)
    modules = [layer.module for layer in found]
    options = {"window": WINDOW, "scorer_checkpoint": tmp_path}
    scores, scorer = (
        scores_of("kvzap", found, heads, group, **options),
        make_scorer("kvzap", **options),
    )
    for ratio in (0.1, 0.25, 0.5):
        wanted = set()
        for number, layer in enumerate(found):
            table = layer.score(press)
            table[:, TOTAL - WINDOW :] = torch.inf
            count = -(-int(1000 * ratio) * TOTAL // 1000) * heads
            for place in table.ravel().topk(count).indices.tolist():
                wanted.add((number, *divmod(place, TOTAL)))
        assert kept_by_us("layer", scores, scorer, ratio=ratio) == wanted
    for threshold in (-0.3, 0.0, 0.25):
        outer = kvpress.DMSPress(press, threshold=threshold, sliding_window_size=WINDOW)
        for layer in found:
            layer.module.masked_key_indices = None
            cached = SimpleNamespace(keys=layer.keys, values=layer.values)
            kwargs = {
                "hidden_states": layer.hidden,
                "past_key_values": SimpleNamespace(layers=[cached] * LAYERS),
                "cache_position": torch.arange(TOTAL),
            }
            outer.forward_hook(layer.module, [], kwargs, [])
        wanted = kept_by_them(modules, heads)
        assert 0.2 < len(wanted) / (LAYERS * heads * TOTAL) < 0.9
        found_by_us = kept_by_us("threshold", scores, scorer, ratio=0.99, threshold=threshold)
        assert found_by_us == wanted


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@torch.no_grad()
def test_fastkvzip(kvpress: Any, split: tuple[int, int], tmp_path: Path) -> None:
    """One budget for each layer, and one for all; the published file is read by kvpress itself."""
    from kvpress.presses import fastkvzip_press

    heads, group = split
    gates = random_gates(LAYERS, heads, group, HIDDEN, dim=16, sinks=16, seed=heads)
    torch.save({"module": gates}, tmp_path / "gates.pt")
    with (
        mock.patch.object(fastkvzip_press, "get_gate_id", lambda name: "q_dim16_sink16.pt"),
        mock.patch.object(
            fastkvzip_press, "hf_hub_download", lambda **where: tmp_path / "gates.pt"
        ),
    ):
        modules = fastkvzip_press.load_fastkvzip("random", "cpu")
    found = layers(split, TOTAL)
    for layer in found:
        layer.module.config._attn_implementation = "sdpa"  # kvpress refuses the other
    window = int(TOTAL * 0.02)
    options = {"window": window, "scorer_checkpoint": write_gates(tmp_path / "data", gates)}
    scorer = make_scorer("fastkvzip", **options)
    scores = scores_of("fastkvzip", found, heads, group, **options)
    model = SimpleNamespace(
        model=SimpleNamespace(layers=[SimpleNamespace(self_attn=x.module) for x in found])
    )
    for scope, layerwise in (("layer", True), ("model", False)):
        for ratio in (0.1, 0.5):
            press = kvpress.FastKVzipPress(1 - ratio, layerwise=layerwise)
            press.gates, press.score_val = modules, [None] * LAYERS
            for layer in found:
                press._score_fast(layer.module, layer.hidden)
            press.compress_post(model)
            wanted = kept_by_them([layer.module for layer in found], heads)
            assert kept_by_us(scope, scores, scorer, ratio=ratio) == wanted


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@torch.no_grad()
def test_duo_attention(kvpress: Any, sparsity: float, tmp_path: Path) -> None:
    """The published table as a profile, scope ``retrieval``, scorer ``streaming``; any length."""
    heads, sink, recent = 6, 5, 20
    gates = np.random.default_rng(7).random((LAYERS, heads)).round(4)
    np.savetxt(tmp_path / "full_attention_heads.tsv", gates, "%.4f", delimiter="\t")
    profile = read_profile(tmp_path, sparsity=sparsity)
    scorer = make_scorer("streaming", window=recent, sink=sink)
    scope = make_scope("retrieval", BudgetSpec(sink + recent), LAYERS, heads, scorer, profile)
    press = kvpress.DuoAttentionPress(sparsity)
    table = sink, recent, np.clip(gates, 0, 1)
    with mock.patch.object(press, "load_attention_pattern", lambda model: table):
        press.post_init_from_model(SimpleNamespace(device="cpu"))
    for total in (27, TOTAL, 1000):
        k = torch.zeros(total, heads, 4)
        scores, wanted, kept = scorer.score(None, k, scale=1.0), set(), set()
        for layer in range(LAYERS):
            module = SimpleNamespace(
                config=SimpleNamespace(_attn_implementation="sdpa"), layer_idx=layer
            )
            keys = k.transpose(0, 1)[None]
            press.compress(module, None, keys, keys, None, {})
            _, head, token = module.masked_key_indices
            masked = set(zip(head.tolist(), token.tolist(), strict=True))
            wanted |= {(layer, h, t) for h in range(heads) for t in range(total)} - {
                (layer, h, t) for h, t in masked
            }
            counts = scope.counts(layer, range(heads), scores, total)
            rows = pick(scores, counts, total).indices.tolist()
            kept |= {(layer, h, t) for h, row in enumerate(rows) for t in row if t >= 0}
        assert kept == wanted
        assert scope.expected(total).sum() == len(kept)

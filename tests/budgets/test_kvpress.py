# SPDX-License-Identifier: Apache-2.0
"""Kept sets of every method that kvpress has, too, are those of kvpress, on random models.

kvpress's own list of packages does not fit the pinned ones, so it goes in without it: `pip install
--no-deps -r requirements/kvpress.txt`, as `make dev` does. Without it these tests are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fairkv_sglang.budgets import (
    BudgetSpec,
    PromptTensors,
    Rope,
    make_scorer,
    pick,
)
from fairkv_sglang.budgets.scopes.base import SCOPES
from fairkv_sglang.budgets.scorers.leverage import sketching

DIM, HIDDEN, LAYERS, WINDOW = 16, 96, 2, 12
SPLITS = {"2 x 3": (2, 3), "6 x 1": (6, 1), "1 x 6": (1, 6)}


@pytest.fixture(scope="module")
def kvpress() -> Iterator[Any]:
    """kvpress, without what its import does to transformers' attention in the whole process."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        yield pytest.importorskip(
            "kvpress", reason="kvpress is not installed (requirements/kvpress.txt)"
        )
    finally:
        for name, function in before.items():
            ALL_ATTENTION_FUNCTIONS[name] = function


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
    def queries(self) -> Tensor:
        """[1, Hq, N, D], rotated."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q = self.module.q_proj(self.hidden).view(1, -1, self.attention.shape[1], DIM)
        turned, _ = apply_rotary_pos_emb(
            q.transpose(1, 2), q.transpose(1, 2), *self.position_embeddings
        )
        return turned

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
        q = self.queries[0].transpose(0, 1).reshape(total, heads, -1, DIM)
        k, v = self.keys[0].transpose(0, 1), self.values[0].transpose(0, 1)
        positions = torch.arange(total + 600)[None]
        cos, sin = self.module.rotary_emb(self.hidden, positions)
        table = torch.cat([cos[0, :, : DIM // 2], sin[0, :, : DIM // 2]], dim=1)
        prompt = PromptTensors(
            q[-scorer.window :], k, DIM**-0.5, v, self.index, range(heads), Rope(lambda: table)
        )
        seen = None
        for start, end in ((0, 100), (100, total)) if scorer.observes else ():
            part = PromptTensors(q[start:end], k[:end], DIM**-0.5, rope=prompt.rope)
            seen = scorer.observe(seen, part)
        scores = scorer.score_prompt(
            PromptTensors(prompt.q, k, prompt.scale, v, self.index, range(heads), prompt.rope, seen)
        )
        return scorer, scorer.combine(scores) if scorer.spans_heads else scores

    def head(self, i: int) -> Layer:
        """KV head i with its query heads as a layer of its own."""
        group = self.attention.shape[1] // self.keys.shape[1]

        def part(layer: Any, heads: int) -> Any:
            return lambda x: layer(x)[..., i * heads * DIM : (i + 1) * heads * DIM]

        module = SimpleNamespace(
            config=SimpleNamespace(num_attention_heads=group, num_key_value_heads=1),
            head_dim=DIM,
            q_proj=part(self.module.q_proj, group),
            k_proj=part(self.module.k_proj, 1),
            rotary_emb=self.module.rotary_emb,
        )
        one = slice(i, i + 1)
        return Layer(
            module, self.hidden, self.position_embeddings, self.keys[:, one], self.values[:, one],
            self.attention[:, i * group : (i + 1) * group], self.index,
        )  # fmt: skip


@torch.no_grad()
def layers(split: tuple[int, int], total: int, seed: int = 0) -> list[Layer]:
    """Layers of a random Llama that reads a random prompt."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(seed)
    heads, group = split
    config = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=heads * group, num_key_value_heads=heads,
        head_dim=DIM, num_hidden_layers=LAYERS, intermediate_size=64, vocab_size=400,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaModel(config).eval()
    found: list[Layer] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        hidden = kwargs["hidden_states"]
        with torch.no_grad():
            none = torch.empty(0)
            found.append(
                Layer(module, hidden, kwargs["position_embeddings"], none, none, none, len(found))
            )

    for layer in model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.mul_(8)  # attention that is not even
        layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    # No token twice: their keys would differ by the rotation alone, and norms and leverage tie.
    prompt = torch.randperm(400)[None, :total]
    output = model(prompt, use_cache=True, output_attentions=True)
    for layer, cached, attention in zip(
        found, output.past_key_values.layers, output.attentions, strict=True
    ):
        layer.module.rotary_emb = model.rotary_emb
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


@pytest.fixture
def same_sketch() -> Iterator[None]:
    """kvpress draws the numbers of a sketch anew for every head and prompt; ours are fixed."""

    real = torch.randn

    def drawn(*shape: int, **options: Any) -> Tensor:
        if "generator" in options:  # ours
            return real(*shape, **options)
        return (sketching(*shape[-2:], torch.device("cpu")) * math.sqrt(shape[-1])).expand(shape)

    with mock.patch.object(torch, "randn", drawn):
        yield


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


@pytest.mark.usefixtures("same_sketch")
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_kept_sets(kvpress: Any, case: str, split: tuple[int, int]) -> None:
    name, options, press, theirs = CASES[case]
    total = 290
    for layer in layers(split, total):
        attention = layer.attention if case == "h2o" else None
        wanted = layer.score(getattr(kvpress, press)(**theirs), attention)
        _, scores = layer.ours(name, **options)
        for budget in (WINDOW + 10, 72, 145):
            assert kept_by_us(scores, budget, total) == kept_by_them(wanted, budget)


@torch.no_grad()
def test_kept_sets_of_lagkv(kvpress: Any) -> None:
    """Ranks of several partitions tie, and torch.topk does not say which of them it takes."""
    for total in (290, 40, 27):
        press = kvpress.LagKVPress(n_sink=3, lag_size=16)
        for layer in layers((2, 3), total):
            wanted = layer.score(press)
            wanted[:, total - WINDOW :] = 2
            _, scores = layer.ours("lagkv", sink=3, lag=16)
            for budget in (WINDOW + 3, 25, total // 2):
                kept = kept_by_us(scores, max(budget, WINDOW + 3), total)
                for row, positions in zip(wanted, kept, strict=True):
                    least = row.topk(len(positions)).values[-1]
                    assert set((row > least).nonzero().ravel().tolist()) <= positions
                    assert positions <= set((row >= least).nonzero().ravel().tolist())


@pytest.mark.usefixtures("same_sketch")
@pytest.mark.parametrize("blocks", [3, 5])
@torch.no_grad()
def test_kept_sets_of_compactor(kvpress: Any, blocks: int) -> None:
    """Head by head, as kvpress normalises over all heads of a layer; and where the last block is
    full, as kvpress pads it with queries and keys of zeros that take part.
    """
    total = 8 + blocks * 48 + WINDOW
    press = kvpress.CompactorPress(
        sink_size_end=WINDOW, chunk_size=48, sketch_dimension=10, blending=0.4
    )
    options = {"sketch": 10, "attention_block": 48, "blending": 0.4}
    for layer in layers((2, 3), total):
        _, scores = layer.ours("compactor", **options)
        for i in range(2):
            head = layer.head(i)
            wanted = head.score(press)
            wanted[:, :8] = torch.inf  # where the highest score ties with the sinks
            _, alone = head.ours("compactor", **options)
            assert torch.equal(alone[0], scores[i])
            for budget in (WINDOW + 10, 60, 90):
                assert kept_by_us(alone, budget, total) == kept_by_them(wanted, budget)


@pytest.mark.parametrize("alpha", [0.2, 0.5])
@pytest.mark.parametrize("scorer", ["snapkv", "keydiff"])
@torch.no_grad()
def test_kept_sets_of_scope_layer(kvpress: Any, scorer: str, alpha: float) -> None:
    total, heads = 256, 6
    for layer in layers((heads, 1), total):
        config = layer.module.config
        config._attn_implementation = "sdpa"  # kvpress refuses the other, which is not run again
        name, options, press, theirs = CASES[scorer]
        inner = getattr(kvpress, press)(**theirs)
        _, scores = layer.ours(name, **options)
        plain = inner.score

        def windowed(*args: Any, plain: Any = plain) -> Tensor:
            found = plain(*args)
            found[..., total - WINDOW :] = torch.inf
            return found

        inner.score = windowed
        for ratio in (0.125, 0.25, 0.5):
            inner.compression_ratio = 1 - ratio
            outer = kvpress.AdaKVPress(inner, alpha_safeguard=alpha)
            where = {"position_embeddings": layer.position_embeddings}
            outer.compress(
                layer.module, layer.hidden, layer.keys.clone(), layer.values, None, where
            )
            _, head, token = layer.module.masked_key_indices
            pruned = set(zip(head.tolist(), token.tolist(), strict=True))
            scope = SCOPES.make(
                "layer", BudgetSpec(ratio=ratio), LAYERS, heads, WINDOW, floor_alpha=alpha
            )
            counts = scope.counts(0, range(heads), scores, total)
            rows = pick(scores, counts, total).indices.tolist()
            kept = {(i, t) for i, row in enumerate(rows) for t in row if t >= 0}
            assert len({*counts.tolist()}) > 1
            assert kept == {(i, t) for i in range(heads) for t in range(total)} - pruned


@torch.no_grad()
def test_kept_sets_of_streaming(kvpress: Any) -> None:
    layer = layers((2, 3), 90)[0]
    _, scores = layer.ours("streaming", sink=4)
    for ratio in (0.25, 0.5):
        budget = int(90 * ratio)
        wanted = layer.score(kvpress.StreamingLLMPress(1 - ratio, n_sink=4))
        assert kept_by_us(scores, budget, 90) == kept_by_them(wanted, budget)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("beta", [2, 20])
def test_budgets_of_pyramid(kvpress: Any, ratio: float, beta: int) -> None:
    """kvpress's schedule is over all kept tokens, ours over those beyond the window: the same
    without one. It rounds each layer alone; ours keeps the total.
    """
    press = kvpress.PyramidKVPress(compression_ratio=1 - ratio, window_size=0, beta=beta)
    scope = SCOPES.make("pyramid", BudgetSpec(ratio=ratio), 8, 2, 0, beta=beta)
    module = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=8))
    rows = scope.expected(1000)[:, 0].tolist()
    for module.layer_idx in range(8):
        assert abs(rows[module.layer_idx] - press.get_layer_budget(module, 1000)) <= 1
    assert sum(rows) == 8 * 1000 * ratio

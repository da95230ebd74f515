# SPDX-License-Identifier: Apache-2.0
"""Kept sets of every method that kvpress has, too, are those of kvpress, on random models.

kvpress's own list of packages does not fit the pinned ones, so it goes in without it: `pip install
--no-deps -r requirements/kvpress.txt`, as `make dev` does. Without it these tests are skipped.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fairkv_sglang.budgets import BudgetSpec, pick
from fairkv_sglang.budgets.scopes.base import SCOPES
from fairkv_tests.kvpress_layers import (
    CASES,
    LAYERS,
    WINDOW,
    kept_by_them,
    kept_by_us,
    layers,
)

SPLITS = {"2 x 3": (2, 3), "6 x 1": (6, 1), "1 x 6": (1, 6)}


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

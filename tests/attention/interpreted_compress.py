# SPDX-License-Identifier: Apache-2.0
"""Compression as on a device, with interpreted Triton kernels: the same kept tokens, no waits, few
launches. Run by tests/kernels/test_triton.py in a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import fairkv_sglang.patches.rank
from fairkv_sglang.attention.choose import Chooser
from fairkv_sglang.attention.compress_all import AllPromptsCompressor
from fairkv_sglang.budgets import BudgetSpec, Keep, make_scorer
from fairkv_sglang.budgets.scorers.tova import TOVA
from fairkv_sglang.budgets.selection import picked, pooled_counts
from fairkv_sglang.kernels import HeadPages
from fairkv_sglang.kernels.cuda import operations, select
from fairkv_sglang.kernels.prompts import PromptBatch
from fairkv_sglang.model import Sliding
from fairkv_tests.compress_cases import (
    LAYERS,
    Model,
    check,
    extreme_scores,
    random_prompts,
    run_ranks,
    run_with_spills,
    settle,
)
from fairkv_tests.core_cases import random_plan
from fairkv_tests.launches import Launches, launches

CHUNKS = ([40, 21], [16, 16, 16, 3], [7], [5, 50], [3, 33])
MOST_LAUNCHES = 10


@pytest.fixture(autouse=True)
def device_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head pages as on a GPU."""
    create = HeadPages.create

    def made(*args: Any, **options: Any) -> HeadPages:
        pages = create(*args, **{**options, "by_columns": False})
        pages.kernels = operations
        return pages

    monkeypatch.setattr(HeadPages, "create", made)
    monkeypatch.setattr(fairkv_sglang.patches.rank, "_rank", None)


@pytest.fixture
def counted() -> Iterator[list[Launches]]:
    """What each layer of each pass that ends a prompt has launched."""
    found: list[Launches] = []
    layer = AllPromptsCompressor.layer

    def count(self: AllPromptsCompressor, *args: Any) -> None:
        from_host = mock.Mock(side_effect=AssertionError("a copy from the host in a layer"))
        with launches() as made, mock.patch.multiple(torch, tensor=from_host, from_numpy=from_host):
            layer(self, *args)
        if self.hand_over.group is None and args[4].last:
            # Beside the layer itself: queries of chunks that are carried over, and at the very end
            # the counts of each prompt, which go to the host.
            made.torch = [x for x in made.torch if x not in ("clone", "cat")]
            while args[0] == LAYERS - 1 and made.torch[-1:] == ["stack"]:
                made.torch.pop()
            found.append(made)

    with mock.patch.object(AllPromptsCompressor, "layer", count):
        yield found


@pytest.mark.parametrize(
    ("scope", "scorer"),
    [
        ("uniform", "snapkv"),
        ("head", "snapkv"),
        ("layer", "snapkv"),
        ("layer", "streaming"),
        ("layer", "keydiff"),
        ("threshold", "compactor"),
        ("pyramid", "tova"),
        ("layer", "lagkv"),
    ],
)
def test_one_rank_keeps_what_the_papers_say_in_few_launches(
    tmp_path: Path, counted: list[Launches], scope: str, scorer: str
) -> None:
    rng, model = np.random.default_rng(1), Model()
    options = {
        "snapkv": {"kernel_size": 5},
        "compactor": {"sink": 3, "sketch": 5, "attention_block": 9},
        "lagkv": {"sink": 2, "lag": 11},
    }.get(scorer, {})
    plan = random_plan(rng, LAYERS, 1, model.heads)
    config = settle(tmp_path, model, plan, scope=scope, ratio=0.4, scorer=scorer, **options)
    prompts = random_prompts(rng, CHUNKS)
    ranks, _ = run_ranks(config, model, 1, lambda rank: rank.run(prompts))
    assert type(ranks[0].compressor) is AllPromptsCompressor
    check(ranks, config, prompts)
    assert len(counted) >= 3 * LAYERS
    for made in counted:
        assert made.waits == []
        if scorer == "snapkv":
            assert made.count <= MOST_LAUNCHES, made


@pytest.mark.parametrize(("scope", "tp_size"), [("uniform", 1), ("layer", 2), ("rank", 2)])
def test_a_layer_with_a_sliding_window_keeps_it(tmp_path: Path, scope: str, tp_size: int) -> None:
    rng, model = np.random.default_rng(tp_size), Model(sliding=Sliding(30, (0,)))
    plan = random_plan(rng, LAYERS, tp_size, model.heads)
    config = settle(tmp_path, model, plan, scope=scope, ratio=0.4, scorer="snapkv")
    prompts = random_prompts(rng, CHUNKS)
    ranks, _ = run_ranks(config, model, tp_size, lambda rank: rank.run(prompts), bounded=True)
    assert type(ranks[0].compressor) is AllPromptsCompressor
    check(ranks, config, prompts)


@pytest.mark.parametrize(
    ("scope", "tp_size"),
    [("uniform", 2), ("layer", 1), ("layer", 2), ("rank", 2), ("threshold", 1)],
)
def test_each_request_has_its_own_budget_and_protected_tokens(
    tmp_path: Path, scope: str, tp_size: int, request: pytest.FixtureRequest
) -> None:
    """In one pass, beside a prompt with the server's budget and one that keeps everything."""
    counted = (
        request.getfixturevalue("counted") if tp_size == 1 else []
    )  # on a CPU hand-over copies
    rng, model = np.random.default_rng(tp_size), Model()
    plan = random_plan(rng, LAYERS, tp_size, model.heads)
    config = settle(tmp_path, model, plan, scope=scope, ratio=0.4, scorer="snapkv")
    prompts = random_prompts(rng, [[21, 40], [16, 45], [3, 58], [21, 20], [9, 41]])
    keeps = [
        Keep(),
        Keep(BudgetSpec(tokens=13)),
        Keep(BudgetSpec(ratio=1.0), ((4, 9),)),
        Keep(None, ((0, 2), (15, 26), (30, 80))),
        Keep(BudgetSpec(tokens=10), ((0, 20),)),
    ]
    for prompt, keep in zip(prompts, keeps, strict=True):
        prompt.keep = keep
    extreme_scores(rng, prompts[:1])
    ranks, _ = run_ranks(config, model, tp_size, lambda rank: rank.run(prompts), bounded=True)
    assert type(ranks[0].compressor) is AllPromptsCompressor
    check(ranks, config, prompts)
    assert all(made.waits == [] for made in counted)


def test_heads_are_combined_prompt_by_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `combine` makes of a prompt may depend on all of its tokens, never on another prompt."""
    rng, model, seen = np.random.default_rng(1), Model(), []
    combine = TOVA.combine

    def spy(self: TOVA, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.shape[1])
        return combine(self, scores)

    monkeypatch.setattr(TOVA, "combine", spy)
    plan = random_plan(rng, LAYERS, 1, model.heads)
    config = settle(tmp_path, model, plan, scope="layer", ratio=0.4, scorer="tova")
    prompts = random_prompts(rng, CHUNKS)
    ranks, _ = run_ranks(config, model, 1, lambda rank: rank.run(prompts))
    window, scope = ranks[0].compressor.scorer.window, ranks[0].compressor.scope
    lengths = [sum(chunks) for chunks in CHUNKS]
    scored = [n - window for n in lengths if scope.budget(n) < n]
    assert sorted(seen) == sorted(scored * LAYERS)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_pass_of_several_methods_goes_prompt_by_prompt(tmp_path: Path, tp_size: int) -> None:
    """Others go as ever."""
    rng, model = np.random.default_rng(tp_size), Model()
    plan = random_plan(rng, LAYERS, tp_size, model.heads)
    config = settle(tmp_path, model, plan, scope="layer", ratio=0.4, scorer="snapkv")
    prompts = random_prompts(rng, [[21, 40], [16, 45], [3, 58], [30]])
    keydiff = make_scorer("keydiff", window=5)
    model_scope = ("model", (("floor_alpha", 0.2),))
    keeps = [Keep(method=model_scope), Keep(), Keep(None, ((2, 9),), keydiff, model_scope), Keep()]
    for prompt, keep in zip(prompts, keeps, strict=True):
        prompt.keep = keep
    with mock.patch.object(
        Chooser, "choices", autospec=True, side_effect=Chooser.choices
    ) as one_by_one:
        ranks, _ = run_ranks(config, model, tp_size, lambda rank: rank.run(prompts), bounded=True)
    assert one_by_one.call_count == LAYERS * tp_size
    check(ranks, config, prompts)


@pytest.mark.parametrize(
    ("scope", "tp_size"), [("uniform", 2), ("layer", 4), ("rank", 2), ("model", 2)]
)
def test_ranks_keep_what_the_papers_say(tmp_path: Path, scope: str, tp_size: int) -> None:
    rng, model = np.random.default_rng(tp_size), Model()
    plan = random_plan(rng, LAYERS, tp_size, model.heads)
    config = settle(tmp_path, model, plan, scope=scope, ratio=0.4, scorer="snapkv")
    prompts = random_prompts(rng, CHUNKS[:3])
    extreme_scores(rng, prompts)
    ranks, _ = run_ranks(config, model, tp_size, lambda rank: rank.run(prompts), bounded=True)
    check(ranks, config, prompts)


def test_one_rank_keeps_no_more_of_a_prompt_than_was_charged(
    tmp_path: Path, counted: list[Launches]
) -> None:
    """In the same launches."""
    spilled, count = run_with_spills(tmp_path, "layer", 1, 0, bounded=True)
    assert spilled == count  # on one rank all take the same
    assert counted and all(m.waits == [] and m.count <= MOST_LAUNCHES for m in counted)


def test_ranks_keep_no_more_of_a_prompt_than_was_charged(tmp_path: Path) -> None:
    spilled, _ = run_with_spills(tmp_path, "layer", 2, 0, bounded=True)
    assert spilled > 0


def batch(lengths: list[int], window: int, beyond: list[int], floor: list[int]) -> PromptBatch:
    scored = [max(n - window, 0) for n in lengths]
    slots = torch.zeros((1, 1), dtype=torch.int32)
    return PromptBatch.create([0] * len(lengths), lengths, scored, slots, beyond, floor)


@pytest.mark.parametrize("block", [32, 2048])
def test_selection_is_that_of_the_budgets(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Ties, NaN, infinities, both zeros; several blocks; prompts that keep everything."""
    monkeypatch.setattr(select, "SCORES", block)
    for seed in range(3):
        make = torch.Generator().manual_seed(seed)
        heads, group, window = 4, (4, 2, 1)[seed % 3], 3
        lengths = [70, 40, 3, 9]
        prompts = batch(lengths, window, [20, 7, 0, 6], [4, 0, 0, 6])
        scores = torch.randint(-3, 3 + 40 * (seed % 2), (heads, prompts.total), generator=make)
        scores = scores.float() * (1 if seed < 2 else 1e-39)
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
        at = torch.randint(0, prompts.total, (8,), generator=make)
        scores[seed % heads, at] = odd.repeat(2)
        counts = select.shared_counts(scores, prompts, group)
        width = int(counts.max()) + 2
        indices = select.pick(scores, counts, prompts, width)
        for p, (length, scored) in enumerate(zip(lengths, prompts.scored, strict=True)):
            if not scored:
                assert counts[p].tolist() == [length] * heads
                assert indices[p, :, :length].tolist() == [list(range(length))] * heads
                continue
            part = scores[:, prompts.starts[p] : prompts.starts[p + 1]]
            beyond, floor = (int(x) for x in prompts.table[5:, p])
            for first in range(0, heads, group):
                order, rows = list(range(group)), slice(first, first + group)
                wanted = pooled_counts(part[rows], group * beyond, order, floor)
                assert counts[p, rows].tolist() == (window + wanted).tolist()
            most = min(width, length)
            assert torch.equal(indices[p, :, :most], picked(part, counts[p], length, most))
            assert bool((indices[p, :, most:] == -1).all())

# SPDX-License-Identifier: Apache-2.0
"""Prompts that are repeated are compressed by the attention of those passes, however passes are cut
and whoever else is in them.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fairkv_sglang.patches.rank
from fairkv_sglang.attention.forward_spans import ForwardSpans, PromptSpan
from fairkv_sglang.budgets.repeats import Wording
from fairkv_sglang.memory.contexts import Context
from fairkv_tests.compress_cases import (
    DIM,
    LAYERS,
    SCALE,
    SLOTS,
    Model,
    Prompt,
    Rank,
    check,
    random_prompts,
    run_ranks,
    settle,
)
from fairkv_tests.core_cases import SCOPES, random_plan

WORDING = Wording(first=(1, 2, 3), later=(1, 2, 4, 5), suffix=(6, 7))
CHUNK = 25


@pytest.fixture(autouse=True)
def _no_rank_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairkv_sglang.patches.rank, "_rank", None)


def repeated(rng: np.random.Generator, model: Model, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts with random tensors of what repeats them."""
    make = torch.Generator().manual_seed(int(rng.integers(2**31)))
    result = []
    for prompt in prompts:
        passes = []
        context = context_of(prompt)
        while not context.complete:
            repeat = context.next(WORDING)
            shape = LAYERS, len(repeat.tokens), model.heads
            q = torch.randn(*shape, model.group, DIM, generator=make) * 2
            passes.append((repeat.start, repeat.end, q, torch.randn(*shape, DIM, generator=make)))
            context.done += 1
        result.append(replace(prompt, passes=tuple(passes)))
    return result


def context_of(prompt: Prompt) -> Context:
    tokens = array("q", range(100, 100 + prompt.length))
    return Context(tokens, WORDING.chunks(tokens, CHUNK))


def run_passes(rank: Rank, prompts: list[Prompt], cut: int) -> list[Context]:
    """All passes of all prompts, ``cut`` tokens of each at a time; the first with the prompt."""
    contexts = [context_of(prompt) for prompt in prompts]
    for number in range(max(len(prompt.passes) for prompt in prompts)):
        parts = []
        for prompt, context in zip(prompts, contexts, strict=True):
            if number < len(prompt.passes):
                repeat, (_, _, q, k) = context.next(WORDING), prompt.passes[number]
                parts.append((prompt, repeat, q, k))
        longest = max(len(part[1].tokens) for part in parts)
        for first in range(0, longest, cut):
            one_pass(rank, parts, first, cut, with_prompt=number == first == 0)
        for _, repeat, _, _ in parts:
            repeat.context.done += 1
    return contexts


def one_pass(rank: Rank, parts: list, first: int, cut: int, *, with_prompt: bool) -> None:
    spans, queries, offset = [], [], 0
    free = iter(sorted(set(range(SLOTS)) - {int(s) for part in parts for s in part[0].slots}))
    for prompt, repeat, q, k in parts:
        # Rows of the requests that only repeat; the last pass has another row.
        behind, row = len(repeat.tokens), prompt.row
        slots = torch.tensor([next(free) for _ in range(behind)])
        rank.table[row, : prompt.length] = prompt.slots.int()
        rank.table[row, prompt.length : prompt.length + behind] = slots.int()
        rank.write(prompt, 0, prompt.length)
        end = min(first + cut, behind)
        for layer in range(LAYERS):
            rank.pools[layer, 0, slots[:end]] = k[layer, :end][:, rank.home]
            rank.pools[layer, 1, slots[:end]] = 0
        if first >= behind:
            continue
        mine = q[:, first:end]
        if with_prompt:
            mine = torch.cat([prompt.q, mine], dim=1)
        queries.append(mine)
        total, length = prompt.length + behind, mine.shape[1]
        spans.append(PromptSpan(row, offset, length, prompt.length + end, total, repeat=repeat))
        assert not spans[-1].is_last
        offset += length
    current = ForwardSpans(tuple(spans))
    rank.book.begin_forward([span.row for span in current.last])
    rank.compressor.begin(current, rank.table)
    for layer in range(LAYERS):
        q = torch.cat([part[layer] for part in queries])[:, rank.home, rank.queries]
        rank.compressor.layer(layer, q, *rank.pools[layer], current, SCALE)
    rank.pools[:] = torch.nan


@pytest.mark.parametrize("cut", [300, 11])
@pytest.mark.parametrize(("scope", "tp_size"), [*((s, 2) for s in SCOPES), ("layer", 1)])
def test_kept_sets_are_those_of_the_formula(
    scope: str, tp_size: int, cut: int, tmp_path: Path
) -> None:
    """Prompts of one chunk and of several, the last one of a single token."""
    model, rng = Model(4, 2), np.random.default_rng(cut)
    plan = random_plan(rng, LAYERS, tp_size, model.heads)
    config = settle(
        tmp_path, model, plan, scope=scope, ratio=0.4, scorer="kvzip", sink=3, chunk=CHUNK
    )
    prompts = repeated(rng, model, random_prompts(rng, ([40, 11], [24], [76]), model=model))

    def work(rank: Rank) -> None:
        contexts = run_passes(rank, prompts, cut)
        for prompt, context in zip(prompts, contexts, strict=True):
            assert context.complete
            rank.admit(prompt)
            rank.write(prompt, 0, prompt.length)
            span = PromptSpan(
                prompt.row, 0, prompt.length, prompt.length, prompt.length, context=context
            )
            current = ForwardSpans((span,))
            rank.book.begin_forward([prompt.row])
            rank.compressor.begin(current, rank.table)
            for layer in range(LAYERS):
                q = prompt.q[layer][:, rank.home, rank.queries]
                rank.compressor.layer(layer, q, *rank.pools[layer], current, SCALE)
        rank.passes.append(prompts)

    ranks, _ = run_ranks(config, model, tp_size, work)
    check(ranks, config, prompts)

# SPDX-License-Identifier: Apache-2.0
"""Ranks in threads that compress hand-made prompts, and the kept sets of the papers' formulae."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from budgets_reference import ada_kv_kept, snapkv_scores, static_kept

from fairkv_sglang.attention.compress import PromptCompressor
from fairkv_sglang.attention.forward_plan import ForwardPlan, PromptSpan
from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.memory import MemoryDivision
from fairkv_sglang.placement import Plan
from fairkv_sglang.planning import ModelShape
from fairkv_sglang.runtime import create_runtime

LAYERS, HEADS, GROUP, DIM, SLOTS, CONTEXT = 2, 4, 2, 8, 600, 200
SCALE = DIM**-0.5
SHAPE = ModelShape("tiny", LAYERS, HEADS, GROUP, DIM, HEADS * GROUP * DIM, 4)


class Collectives:
    """``torch.distributed`` for ranks that are threads; a group is (rank, number of ranks)."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.parts: list[torch.Tensor] = [torch.empty(0)] * ranks

    def get_world_size(self, group: tuple[int, int]) -> int:
        return group[1]

    def exchange(self, group: tuple[int, int], mine: torch.Tensor) -> torch.Tensor:
        self.parts[group[0]] = mine.clone()
        self.barrier.wait()
        everyone = torch.stack(list(self.parts))
        self.barrier.wait()
        return everyone

    def all_gather_into_tensor(self, out, mine, group) -> None:
        assert out.shape == (group[1] * mine.shape[0], *mine.shape[1:])
        out.copy_(self.exchange(group, mine).flatten(0, 1))

    def all_reduce(self, mine, group) -> None:
        mine.copy_(self.exchange(group, mine).sum(0))


@dataclass
class Prompt:
    """A prompt: ``prefix`` tokens are cached, ``chunks`` are the lengths of its spans."""

    row: int
    chunks: list[int]
    prefix: int
    q: torch.Tensor  # [L, N, H, g, D]
    k: torch.Tensor  # [L, N, H, D]
    v: torch.Tensor
    slots: torch.Tensor  # int64 [N]

    @property
    def length(self) -> int:
        return self.prefix + sum(self.chunks)


def random_prompts(rng: np.random.Generator, chunks: Sequence[Sequence[int]], prefix: int = 0):
    """Prompts in rows 1, 2, ... with slots scattered over the pool."""
    make = torch.Generator().manual_seed(int(rng.integers(2**31)))
    free = rng.permutation(SLOTS).tolist()
    prompts = []
    for row, parts in enumerate(chunks, 1):
        n = prefix + sum(parts)
        q = torch.randn(LAYERS, n, HEADS, GROUP, DIM, generator=make) * 2
        k = torch.randn(LAYERS, n, HEADS, DIM, generator=make)
        v = torch.randn(LAYERS, n, HEADS, DIM, generator=make)
        slots = torch.tensor([free.pop() for _ in range(n)])
        prompts.append(Prompt(row, list(parts), prefix, q, k, v, slots))
    return prompts


class Rank:
    """One rank: a real runtime, its book, and its part of the pool."""

    def __init__(self, config: FairKVConfig, tp_size: int, rank: int, group: object) -> None:
        self.runtime = create_runtime(config, SHAPE, tp_size, rank, lambda: [])
        division = MemoryDivision(
            total_bytes=0,
            pool_tokens=SLOTS,
            pool_bytes=np.zeros(tp_size, dtype=np.int64),
            table_bytes=np.zeros(tp_size, dtype=np.int64),
            arena_pages=np.full(tp_size, 400),
            page_bytes=1,
            max_requests=4,
            max_head_tokens=CONTEXT,
        )
        self.book = self.runtime.create_book(division, torch.float32, "cpu")
        self.compressor = PromptCompressor(self.runtime, group)  # type: ignore[arg-type]
        self.heads = [list(row) for row in self.runtime.heads.heads]
        # What a prompt has not written yet must not be read.
        self.pools = [torch.full((2, SLOTS, len(row), DIM), torch.nan) for row in self.heads]
        self.table = torch.zeros((5, CONTEXT), dtype=torch.int32)

    def write(self, prompt: Prompt, start: int, end: int) -> None:
        for layer, heads in enumerate(self.heads):
            for pool, source in zip(self.pools[layer], (prompt.k, prompt.v), strict=True):
                pool[prompt.slots[start:end]] = source[layer, start:end][:, heads]

    def admit(self, prompt: Prompt) -> None:
        self.book.admit(prompt.row, prompt.length)
        self.table[prompt.row, : prompt.length] = prompt.slots.int()
        self.write(prompt, 0, prompt.prefix)

    def forward(self, parts: list[tuple[Prompt, int, int]]) -> None:
        """One pass over [start, end) of each prompt."""
        spans, offset = [], 0
        for prompt, start, end in parts:
            spans.append(PromptSpan(prompt.row, offset, end - start, end, prompt.length))
            offset += end - start
            self.write(prompt, start, end)
        plan = ForwardPlan(tuple(spans))
        self.book.begin_forward([span.row for span in plan.last])
        self.compressor.begin(plan, self.table)
        for layer, heads in enumerate(self.heads):
            q = torch.cat([p.q[layer, start:end][:, heads] for p, start, end in parts])
            k, v = self.pools[layer]
            self.compressor.layer(layer, q, k, v, plan, SCALE)

    def run(self, prompts: list[Prompt]) -> None:
        """Pass i holds chunk i of every prompt that has one."""
        for prompt in prompts:
            self.admit(prompt)
        for turn in range(max(len(prompt.chunks) for prompt in prompts)):
            parts = []
            for prompt in prompts:
                if turn < len(prompt.chunks):
                    start = prompt.prefix + sum(prompt.chunks[:turn])
                    parts.append((prompt, start, start + prompt.chunks[turn]))
            self.forward(parts)


def run_ranks(config: FairKVConfig, tp_size: int, monkeypatch, work) -> list[Rank]:
    """``work(rank)`` on every rank at the same time."""
    from fairkv_sglang.attention import exchange

    collectives = Collectives(tp_size)
    monkeypatch.setattr(exchange, "dist", collectives)
    groups = [(rank, tp_size) if tp_size > 1 else None for rank in range(tp_size)]
    ranks = [Rank(config, tp_size, rank, group) for rank, group in enumerate(groups)]
    with ThreadPoolExecutor(tp_size) as pool:
        list(pool.map(work, ranks))
    return ranks


def expected_kept(rank: Rank, config: FairKVConfig, plan: Plan, prompt: Prompt) -> list:
    """[layer][head] -> kept positions, by the papers' formulae."""
    runtime, total = rank.runtime, prompt.length
    window, budget = config.window, runtime.scope.budget(total)
    result = []
    for layer in range(LAYERS):
        if config.scorer == "snapkv":
            scores = snapkv_scores(
                prompt.q[layer, -window:].numpy(),
                prompt.k[layer].numpy(),
                window=window,
                kernel=config.kernel_size,
                pooling=config.pooling,
                scale=SCALE,
            ).tolist()
        else:  # the first `sink` tokens in order, then the later the better
            row = [-t if t < config.sink else t - 10**6 for t in range(max(total - window, 0))]
            scores = [row] * HEADS
        if config.scope in ("uniform", "head"):
            counts = runtime.scope.expected(total)[layer].tolist()
            result.append(static_kept(scores, counts, total))
            continue
        kept: list[list[int]] = [[] for _ in range(HEADS)]
        groups = [range(HEADS)]
        if config.scope == "rank":
            groups = [plan.heads(layer, r) for r in range(plan.tp_size)]
        for group in groups:
            heads = sorted(group)
            rows = [scores[h] for h in heads]
            alpha = config.floor_alpha
            for head, kept_row in zip(
                heads, ada_kv_kept(rows, heads, budget, window, alpha, total), strict=True
            ):
                kept[head] = kept_row
        result.append(kept)
    return result


def write_plan(plan: Plan, folder: Path) -> Path:
    path = folder / "plan.json"
    plan.to_file(path)
    return path

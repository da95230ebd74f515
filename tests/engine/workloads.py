# SPDX-License-Identifier: Apache-2.0
"""Models, prompts, placements and profiles that several tests of this folder share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import random_prompts

from fairkv_sglang.placement import HeadShare, Plan
from fairkv_sglang.profiles import HeadProfile

LAYERS, KV_HEADS = 3, 8
MODEL: dict[str, Any] = {"layers": LAYERS, "q_heads": 16, "kv_heads": KV_HEADS}
"""Shape of the model of most tests: GQA groups of 2, uneven placements possible up to TP 4."""

LENGTHS = [1, 2, 5, 17, 33, 64, 100, 200, 300, 400, 511, 512, 513, 700, 1200, 2000]
"""Prompt lengths of the batch: around the window (32), a head page (16) and a chunk (512)."""
NEW_TOKENS = 24
BATCH = random_prompts(LENGTHS, vocab=500, seed=1)
ENGINE: dict[str, Any] = {"max_total_tokens": 40_000, "chunked_prefill_size": 512}
"""Memory for the whole batch at once, and chunks that cut the longer prompts."""


def _stress() -> tuple[list[list[int]], list[int]]:
    rng = np.random.default_rng(2)
    shared = random_prompts([150], vocab=500, seed=3)[0]
    lengths = rng.choice([1, 5, 20, 40, 90, 150, 300, 500], size=32).tolist()
    prompts = random_prompts(lengths, vocab=500, seed=4)
    prompts = [shared + prompt if i % 3 == 0 else prompt for i, prompt in enumerate(prompts)]
    return prompts, rng.choice([1, 2, 3, 40, 250], size=32).tolist()


STRESS, STRESS_TOKENS = _stress()
"""Many requests of mixed lengths, a third of them with a common prefix."""


def random_plan(tp_size: int, seed: int, layers: int = LAYERS, heads: int = KV_HEADS) -> Plan:
    """A placement that no policy would make: uneven counts, permuted heads, uneven copies.

    About 40 % of the heads are on two or more ranks, with shares from a Dirichlet distribution.
    """
    rng = np.random.default_rng(seed)
    rows: list[tuple[tuple[HeadShare, ...], ...]] = []
    while len(rows) < layers:
        ranks: list[list[HeadShare]] = [[] for _ in range(tp_size)]
        for head in rng.permutation(heads):
            copied = tp_size > 1 and rng.random() < 0.4
            count = int(rng.integers(2, tp_size + 1)) if copied else 1
            shares = rng.dirichlet(np.full(count, 2.0)) + 1e-3
            for rank, share in zip(
                rng.choice(tp_size, count, replace=False), shares / shares.sum(), strict=True
            ):
                ranks[rank].append(HeadShare(head=int(head), share=float(share)))
        if all(ranks):  # every rank serves a head in every layer
            rows.append(tuple(tuple(row) for row in ranks))
    return Plan(
        policy=f"random-{seed}",
        tp_size=tp_size,
        num_layers=layers,
        num_kv_heads=heads,
        layers=tuple(rows),
    )


def write_plan(folder: Path, tp_size: int, seed: int) -> str:
    """The same as a file; returns its path."""
    path = folder / f"plan-tp{tp_size}-seed{seed}.json"
    random_plan(tp_size, seed).to_file(path)
    return str(path)


def write_profile(folder: Path, seed: int = 0) -> str:
    """A profile with a factor of about 20 between the hungriest and the most frugal head."""
    path = folder / f"profile-{seed}.json"
    shares = np.random.default_rng(seed).lognormal(0.0, 0.8, size=(LAYERS, KV_HEADS))
    HeadProfile(model=None, shares=shares / shares.sum(), meta={"source": "random"}).save(path)
    return str(path)

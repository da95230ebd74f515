# SPDX-License-Identifier: Apache-2.0
"""Models, prompts, placements and profiles that several tests of this folder share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.patches.versions import reserves_whole_outputs
from fairkv_sglang.placement import HeadShare, Plan, make_plan
from fairkv_sglang.placement.homes import Homes
from fairkv_sglang.profiles import HeadProfile
from fairkv_tests.tiny_models import random_prompts

LAYERS, KV_HEADS = 3, 8
MODEL: dict[str, Any] = {"layers": LAYERS, "q_heads": 16, "kv_heads": KV_HEADS}
"""Shape of the model of most tests: GQA groups of 2, uneven placements possible up to TP 4."""
FEW_HEADS = 2
FEW: dict[str, Any] = {**MODEL, "q_heads": 8, "kv_heads": FEW_HEADS}
"""A model with fewer KV heads than TP 4 has ranks: each head's query heads are on two of them."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama, tied, biases": {"architecture": "llama", "tied": True, "bias": True},
    "mistral": {"architecture": "mistral"},
    "mixtral": {"architecture": "mixtral"},
    "phi3": {"architecture": "phi3"},
    "qwen2": {"architecture": "qwen2"},
    "qwen2, tied": {"architecture": "qwen2", "tied": True},
    "qwen3_moe": {"architecture": "qwen3_moe"},
    "gemma3": {"architecture": "gemma3"},
    "gpt_oss": {"architecture": "gpt_oss"},
}
"""Families beside those of most tests (Llama, Qwen3), to be added to :data:`MODEL`."""

BUDGETED = {"gemma3": [1], "gpt_oss": [1]}
"""Layers with a budget, of families whose other layers have a sliding window."""

LENGTHS = [1, 2, 5, 17, 33, 64, 100, 200, 300, 400, 511, 512, 513, 700, 1200, 2000]
"""Prompt lengths of the batch: around the window (32), a head page (16) and a chunk (512)."""
NEW_TOKENS = 24
BATCH = random_prompts(LENGTHS, vocab=500, seed=1)
ENGINE: dict[str, Any] = {"max_total_tokens": 40_000, "chunked_prefill_size": 512}
"""Memory for the whole batch at once, and chunks that cut the longer prompts."""
CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
"""SGLang ends a rank that leaks a slot; FairKV adds head pages to the same check."""

RETRACTS = (
    {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
    if reserves_whole_outputs()
    else {}
)
"""With it an overcommitted server retracts on any SGLang."""


def saw_retraction(log: str) -> bool:
    """Whether a server's log tells of one."""
    return "Retract requests" in log or "Testing retraction" in log


def _stress() -> tuple[list[list[int]], list[int]]:
    rng = np.random.default_rng(2)
    shared = random_prompts([150], vocab=500, seed=3)[0]
    lengths = rng.choice([1, 5, 20, 40, 90, 150, 300, 500], size=32).tolist()
    prompts = random_prompts(lengths, vocab=500, seed=4)
    prompts = [shared + prompt if i % 3 == 0 else prompt for i, prompt in enumerate(prompts)]
    return prompts, rng.choice([1, 2, 3, 40, 250], size=32).tolist()


STRESS, STRESS_TOKENS = _stress()
"""Many requests of mixed lengths, a third of them with a common prefix."""


def random_plan(
    tp_size: int, seed: int, layers: int = LAYERS, heads: int = KV_HEADS, away: bool = False
) -> Plan:
    """A placement that no policy would make: uneven counts, permuted heads, uneven copies.

    About 40 % of the heads are on two or more ranks, with shares from a Dirichlet distribution.
    With ``away`` no head is served by a rank that is its home in prefill.
    """
    rng = np.random.default_rng(seed)
    at_home = Homes(heads, tp_size).at_home
    rows: list[tuple[tuple[HeadShare, ...], ...]] = []
    while len(rows) < layers:
        ranks: list[list[HeadShare]] = [[] for _ in range(tp_size)]
        for head in rng.permutation(heads):
            allowed = np.flatnonzero(~at_home[:, head]) if away else np.arange(tp_size)
            copied = len(allowed) > 1 and rng.random() < 0.4
            count = int(rng.integers(2, len(allowed) + 1)) if copied else 1
            shares = rng.dirichlet(np.full(count, 2.0)) + 1e-3
            for rank, share in zip(
                rng.choice(allowed, count, replace=False), shares / shares.sum(), strict=True
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


def policy_plan(policy: str, tp_size: int, heads: int = KV_HEADS) -> Plan:
    """What a policy makes of loads with a factor of about 20 between heads."""
    loads = np.random.default_rng(7).lognormal(0.0, 0.8, size=(LAYERS, heads))
    return make_plan(policy, loads, tp_size)


def write_plan(
    folder: Path,
    tp_size: int,
    placement: int | str,
    heads: int = KV_HEADS,
    away: bool = False,
) -> str:
    """The random placement of a seed, or a policy's, as a file; returns its path."""
    path = folder / f"plan-tp{tp_size}-{placement}-{heads}.json"
    if isinstance(placement, int):
        plan = random_plan(tp_size, placement, heads=heads, away=away)
    else:
        plan = policy_plan(placement, tp_size, heads)
    plan.to_file(path)
    return str(path)


def far_from_home(plan: Plan) -> bool:
    """Uneven, permuted, copied, and with a head in it that no rank keeps at home."""
    homes = Homes(plan.num_kv_heads, plan.tp_size)
    lanes = [[plan.heads(layer, rank) for rank in range(plan.tp_size)] for layer in range(LAYERS)]
    return (
        any(len(set(map(len, layer))) > 1 for layer in lanes)
        and any(list(heads) != sorted(heads) for layer in lanes for heads in layer)
        and int(plan.copy_counts().sum()) > 0
        and bool(((plan.shares() > 0) & homes.at_home).any(axis=1).min() == 0)
    )


def write_profile(folder: Path, heads: int = KV_HEADS, seed: int = 0) -> str:
    """A profile with a factor of about 20 between the hungriest and the most frugal head."""
    path = folder / f"profile-{heads}-{seed}.json"
    shares = np.random.default_rng(seed).lognormal(0.0, 0.8, size=(LAYERS, heads))
    HeadProfile(model=None, shares=shares / shares.sum(), meta={"source": "random"}).save(path)
    return str(path)

# SPDX-License-Identifier: Apache-2.0
"""Head pages hold exactly the kept sets of the papers, for any chunks, scope, scorer and TP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compress_cases import (
    HEADS,
    LAYERS,
    Prompt,
    Rank,
    expected_kept,
    random_prompts,
    run_ranks,
    write_plan,
)
from core_cases import SCOPES, random_plan

import fairkv_sglang.runtime
from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.kernels import reference
from fairkv_sglang.placement import Plan
from fairkv_sglang.profiles import HeadProfile

# Row by row the chunks of a prompt: one chunk, several, a last one shorter than the window, chunks
# all shorter than the window, prompts within the window.
CHUNKS = (
    ([61],),
    ([40, 21], [16, 16, 16, 3]),
    ([5, 4, 3, 2, 1, 30, 2], [3], [33]),
    ([7], [2, 2, 2, 2, 2, 2, 2, 2, 2], [8, 1]),
)


@pytest.fixture(autouse=True)
def _no_runtime_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairkv_sglang.runtime, "_runtime", None)


def settle(folder: Path, plan: Plan, **options: object) -> FairKVConfig:
    """Configuration with this plan, and a profile where the scope needs one."""
    if options["scope"] == "head":
        shares = np.random.default_rng(5).random((LAYERS, HEADS)) ** 2
        HeadProfile(model=None, shares=shares / shares.sum(), meta={}).save(folder / "p.json")
        options["profile"] = folder / "p.json"
    values = {"enabled": True, "window": 8, "plan": write_plan(plan, folder), **options}
    return FairKVConfig(**values)


def check(ranks: list[Rank], config: FairKVConfig, plan: Plan, prompts: list[Prompt]) -> list:
    """Pages against the formulae; returns the kept sets."""
    owners = {p.row: ranks[0].book.owners(p.row) for p in prompts}
    everything = []
    for prompt in prompts:
        kept = expected_kept(ranks[0], config, plan, prompt)
        everything.append(kept)
        counts = torch.tensor([[len(row) for row in layer] for layer in kept])
        for index, rank in enumerate(ranks):
            assert np.array_equal(rank.book.owners(prompt.row), owners[prompt.row])
            for layer in range(LAYERS):
                for local, head in enumerate(rank.heads[layer]):
                    lane = rank.runtime.heads.lane_start[layer] + local
                    k, v = reference.gather(rank.book.pages, prompt.row, lane)
                    if owners[prompt.row][layer, head] != index:
                        assert len(k) == 0
                        continue
                    positions = kept[layer][head]
                    assert torch.equal(k, prompt.k[layer, positions, head]), (layer, head)
                    assert torch.equal(v, prompt.v[layer, positions, head])
            if config.scope in ("layer", "rank"):
                noted = rank.book._lives[prompt.row].kept
                assert noted is not None and torch.equal(noted, counts)
            rank.book.hand_over(prompt.row, prompt.length)
    for index, rank in enumerate(ranks):
        rank.book.pages.check_integrity()
        assert rank.book.pages.num_used == rank.book.ledger.held[index]
        assert not rank.compressor._tails  # nothing is carried on from prompts that have ended
        for prompt in prompts:
            rank.book.free(prompt.row)
        assert rank.book.check_idle() == []
    assert len({rank.book.log.digest for rank in ranks}) == 1
    return everything


@pytest.mark.parametrize("chunks", CHUNKS, ids=range(len(CHUNKS)))
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "scorer",
    [
        {"scorer": "snapkv", "kernel_size": 5, "pooling": "max"},
        {"scorer": "snapkv", "kernel_size": 3, "pooling": "avg"},
        {"scorer": "streaming", "sink": 3},
    ],
    ids=["max", "avg", "streaming"],
)
def test_one_rank_with_permuted_heads(
    scorer: dict, scope: str, chunks: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(len(chunks))
    plan = random_plan(rng, LAYERS, 1, HEADS)
    budget = {"budget": 14} if len(chunks) % 2 else {"ratio": 0.4}
    config = settle(tmp_path, plan, scope=scope, **scorer, **budget)
    prompts = random_prompts(rng, chunks)
    ranks = run_ranks(config, 1, monkeypatch, lambda rank: rank.run(prompts))
    check(ranks, config, plan, prompts)


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scorer", ["snapkv", "streaming"])
def test_ranks_keep_what_one_rank_keeps(
    scorer: str, scope: str, tp_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(tp_size)
    plan = random_plan(rng, LAYERS, tp_size, HEADS, copies=scope != "rank")
    config = settle(tmp_path, plan, scope=scope, scorer=scorer, ratio=0.3)
    prompts = random_prompts(rng, CHUNKS[2])
    ranks = run_ranks(config, tp_size, monkeypatch, lambda rank: rank.run(prompts))
    together = check(ranks, config, plan, prompts)
    if scope == "rank":
        return  # another method at every TP
    whole = Plan.from_shares(np.ones((LAYERS, 1, HEADS)), "one rank")
    config = settle(tmp_path, whole, scope=scope, scorer=scorer, ratio=0.3)
    alone = run_ranks(config, 1, monkeypatch, lambda rank: rank.run(prompts))
    assert check(alone, config, whole, prompts) == together


@pytest.mark.parametrize("scope", ["uniform", "layer"])
def test_a_rank_without_primary_heads(
    scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 holds copies only, so it sends no scores but must get all."""
    shares = np.zeros((LAYERS, 2, HEADS))
    shares[:, 0], shares[:, 1, :2] = 1, 0.5
    shares[:, 0, :2] = 0.5
    plan = Plan.from_shares(shares, "copies")
    config = settle(tmp_path, plan, scope=scope, ratio=0.4)
    prompts = random_prompts(np.random.default_rng(1), ([30], [41], [29]))
    ranks = run_ranks(config, 2, monkeypatch, lambda rank: rank.run(prompts))
    assert {int(o) for p in prompts for o in ranks[0].book.owners(p.row).ravel()} == {0, 1}
    check(ranks, config, plan, prompts)


@pytest.mark.parametrize("first", [2, 8, 11])
def test_a_row_after_an_aborted_prompt(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next request on the row has a cached prefix: it must not see the queries left there."""
    plan = Plan.from_shares(np.ones((LAYERS, 1, HEADS)), "one rank")
    config = settle(tmp_path, plan, scope="layer", ratio=0.4)
    rng = np.random.default_rng(first)
    aborted, prompt = random_prompts(rng, ([20, 30], [first, 13 - first]), prefix=20)
    prompt.row = aborted.row

    def work(rank: Rank) -> None:
        rank.admit(aborted)
        rank.forward([(aborted, 20, 40)])
        rank.book.free(aborted.row)
        rank.run([prompt])

    check(run_ranks(config, 1, monkeypatch, work), config, plan, [prompt])


def test_budget_of_the_whole_prompt_keeps_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.from_shares(np.ones((LAYERS, 1, HEADS)), "one rank")
    config = settle(tmp_path, plan, scope="layer", budget=500)
    prompts = random_prompts(np.random.default_rng(0), ([50, 2],))
    ranks = run_ranks(config, 1, monkeypatch, lambda rank: rank.run(prompts))
    kept = check(ranks, config, plan, prompts)
    assert kept == [[[list(range(52))] * HEADS] * LAYERS]


def test_scope_rank_refuses_copies(tmp_path: Path) -> None:
    shares = np.full((LAYERS, 2, HEADS), 0.5)
    config = settle(tmp_path, Plan.from_shares(shares, "copies"), scope="rank")
    with pytest.raises(ValueError, match="no head can be on two: use --fairkv-placement"):
        Rank(config, 2, 0, None)

# SPDX-License-Identifier: Apache-2.0
"""Random plans, scopes and profiles for the tests of memory, parallel, attention and patches."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from fairkv_sglang.budgets import AS_SERVER, BudgetScope, BudgetSpec, Keep, make_scope, make_scorer
from fairkv_sglang.budgets import SCOPES as BUDGET_SCOPES
from fairkv_sglang.budgets.keep import merged
from fairkv_sglang.memory import PAGE_TOKENS, PageDemand, PageLedger
from fairkv_sglang.memory.forecast import LEAST_SEEN
from fairkv_sglang.parallel import LaneTable, RankHeads
from fairkv_sglang.placement import Plan, Router
from fairkv_sglang.placement.homes import Homes
from fairkv_sglang.placement.plan import HeadShare
from fairkv_sglang.profiles import HeadProfile

QUICK = settings(deadline=None, derandomize=True, database=None)
SCOPES = ("uniform", "head", "layer", "rank", "threshold", "pyramid", "model")
seeds = st.integers(0, 2**32 - 1)
# (KV heads, ranks) that SGLang can split, fewer heads than ranks included.
splits = st.sampled_from([(1, 1), (4, 1), (5, 1), (4, 2), (6, 2), (6, 3), (4, 4), (2, 4), (1, 2)])


def random_plan(
    rng: np.random.Generator, layers: int, ranks: int, heads: int, copies: bool = True
) -> Plan:
    """Any valid plan: uneven, in any order, with copies of any share. Needs heads >= ranks, or
    copies.
    """
    rows = []
    for _ in range(layers):
        serving: list[set[int]] = [{int(rng.integers(ranks))} for _ in range(heads)]
        if copies:
            for who in serving:
                who |= {r for r in range(ranks) if rng.random() < 0.25}
        for rank in range(ranks):
            while not any(rank in who for who in serving):
                head = int(rng.integers(heads))
                if copies:
                    serving[head].add(rank)
                elif sum(serving[head] <= who for who in serving) > 1:
                    serving[head] = {rank}  # taken from a rank that has another
        lanes: list[list[HeadShare]] = [[] for _ in range(ranks)]
        for head in rng.permutation(heads).tolist():
            who = sorted(serving[head])
            parts = rng.random(len(who)) + 0.05
            for rank, part in zip(who, parts / parts.sum(), strict=True):
                lanes[rank].append(HeadShare(head=head, share=float(part)))
        rows.append(tuple(tuple(lane) for lane in lanes))
    return Plan(
        policy="random",
        model=None,
        tp_size=ranks,
        num_layers=layers,
        num_kv_heads=heads,
        layers=tuple(rows),
        info={},
    )


def random_owners(rng: np.random.Generator, plan: Plan) -> np.ndarray:
    """[L, H] int16: any rank that serves the head."""
    return np.array(
        [[rng.choice(who) for who in row] for row in plan.copies()], dtype=np.int16
    ).reshape(plan.num_layers, plan.num_kv_heads)


def random_scope(
    rng: np.random.Generator, name: str, layers: int, heads: int, ranks: int = 1, window: int = 4
) -> BudgetScope:
    """A scope of this name with a random budget, as ranks of this number have it; scope head (and
    maybe layer) with a profile.
    """
    spec = (
        BudgetSpec(tokens=int(rng.integers(window + 1, 70)))
        if rng.random() < 0.5
        else BudgetSpec(ratio=float(rng.uniform(0.05, 1.0)))
    )
    alpha = float(rng.random())
    profile = None
    if name == "head" or (name in ("layer", "model") and rng.random() < 0.5):
        shares = rng.random((layers, heads)) ** 3 + 1e-3
        profile = HeadProfile(model=None, shares=shares / shares.sum(), meta={})
    scorer = make_scorer("streaming", sink=0, window=window)
    options = {"floor_alpha": alpha} if "floor_alpha" in BUDGET_SCOPES.options(name) else {}
    if name == "threshold":
        options["threshold"] = 0.5
    scope = make_scope(name, spec, layers, heads, scorer, profile, **options)
    scope.home_size = Homes(heads, ranks).per_rank
    return scope


def random_keep(rng: np.random.Generator, scope: BudgetScope) -> Keep:
    """What a request wants: nothing of its own, a budget, everything, protected tokens."""
    if rng.random() < 0.5:
        return AS_SERVER
    spec = [
        None,
        BudgetSpec(tokens=scope.least + int(rng.integers(60))),
        BudgetSpec(ratio=float(rng.uniform(0.05, 1.0))),
        BudgetSpec(ratio=1.0),
    ][int(rng.integers(4))]
    ends = np.sort(rng.integers(0, 120, (int(rng.integers(3)), 2)), axis=1).tolist()
    spans = merged((start, end) for start, end in ends)
    if spec is None or spec.tokens is not None or rng.random() < 0.5:
        return Keep(spec, spans)
    names = [name for name in SCOPES if name != "head" or scope.profile is not None]
    scorer = make_scorer("streaming", sink=int(rng.integers(3)), window=int(rng.integers(1, 9)))
    return Keep(spec, spans, scorer, (str(rng.choice(names)), ()))


def random_scores(
    rng: np.random.Generator, heads: int, prompt_len: int, window: int
) -> torch.Tensor:
    """[H, N - window]: sometimes one head wins everything, sometimes all scores are equal."""
    shape = (heads, max(prompt_len - window, 0))
    kind = rng.integers(4)
    scores = rng.random(shape, dtype=np.float32)
    if kind == 0:
        scores[rng.integers(heads)] += 10
    elif kind == 1:
        scores[:] = 1.0
    elif kind == 2:
        scores += np.arange(heads, dtype=np.float32)[:, None]
    return torch.from_numpy(scores)


def kept_counts(
    scope: BudgetScope, plan: Plan, prompt_len: int, scores: list[torch.Tensor]
) -> np.ndarray:
    """[L, H] kept tokens as the ranks find them from scores [H, M] of each layer."""
    if scope.spans_layers:
        flat = torch.cat(scores)
        found = scope.counts(0, range(len(flat)), flat, prompt_len)
        return found.view(plan.num_layers, -1).numpy()
    kept = np.zeros((plan.num_layers, plan.num_kv_heads), dtype=np.int64)
    homes = Homes(plan.num_kv_heads, plan.tp_size)
    groups = [range(plan.num_kv_heads)]
    if scope.name == "rank":
        groups = [homes.heads(rank) for rank in range(plan.tp_size)]
    for layer, table in enumerate(scores):
        for group in map(list, groups):
            kept[layer, group] = scope.counts(layer, group, table[group], prompt_len).numpy()
    return kept


def pages_by_rank(kept: np.ndarray, owners: np.ndarray, ranks: int) -> np.ndarray:
    """[R] pages of kept [L, H] tokens, counted one head at a time."""
    pages = np.zeros(ranks, dtype=np.int64)
    for owner, tokens in zip(owners.ravel().tolist(), kept.ravel().tolist(), strict=True):
        pages[owner] += (tokens + PAGE_TOKENS - 1) // PAGE_TOKENS
    return pages


def make_books(
    plan: Plan,
    scope: BudgetScope,
    capacity: np.ndarray,
    *,
    rows: int = 8,
    max_pages: int = 40,
    pool_tokens: int = 1 << 20,
    head_dim: int = 8,
    slots: int | None = None,
    forecast_factor: float = 1.0,
    slack: int | None = None,
) -> list:
    """One RowBook per rank, as the ranks' processes would have them."""
    from fairkv_sglang.kernels import HeadPages
    from fairkv_sglang.memory.rows import RowBook

    books = []
    for rank in range(plan.tp_size):
        heads = RankHeads(plan, rank, 2, LaneTable(plan, slots))
        books.append(
            RowBook(
                heads=heads,
                scope=scope,
                demand=PageDemand(scope, plan.shares() > 0),
                router=Router(plan),
                ledger=PageLedger(capacity),
                pages=HeadPages.create(
                    int(capacity[rank]), rows, heads.num_lanes, max_pages, head_dim, torch.float32
                ),
                pool_tokens=pool_tokens,
                forecast_factor=forecast_factor,
                slack=slack,
            )
        )
    return books


def seen_before(books: list, rng: np.random.Generator, prompt_len: int = 200) -> None:
    """Every rank has seen so many prompts as it takes to expect what a new one takes."""
    scope, plan = books[0].scope, books[0].heads.plan
    for _ in range(LEAST_SEEN):
        scores = [
            random_scores(rng, plan.num_kv_heads, prompt_len, scope.window)
            for _ in range(plan.num_layers)
        ]
        kept = kept_counts(scope, plan, prompt_len, scores)
        for book in books:
            book.recorder.add(kept, prompt_len)

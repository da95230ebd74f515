# SPDX-License-Identifier: Apache-2.0
"""Ranks in threads that compress hand-made prompts at the heads' homes, and the kept sets of the
papers' formulae.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from fairkv_sglang.attention import choose, exchange, hand_over
from fairkv_sglang.attention.compress_all import make_compressor
from fairkv_sglang.attention.exchange import HomeExchange
from fairkv_sglang.attention.forward_spans import ForwardSpans, PromptSpan
from fairkv_sglang.attention.hand_over import HandOver
from fairkv_sglang.attention.hidden_scores import HiddenScores
from fairkv_sglang.budgets import AS_SERVER, SCORERS, BudgetScope, Keep, Scorer
from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.kernels import PAGE_TOKENS, torch_decode
from fairkv_sglang.memory import MemoryDivision
from fairkv_sglang.memory.make_book import make_book
from fairkv_sglang.model import Model as Description
from fairkv_sglang.model import Sliding
from fairkv_sglang.patches.rank import Rank as RankState
from fairkv_sglang.patches.rank import begin
from fairkv_sglang.placement import Plan
from fairkv_sglang.placement.homes import Homes
from fairkv_sglang.planning import make_start
from fairkv_sglang.profiles import HeadProfile
from fairkv_tests import scorer_references
from fairkv_tests.budgets_reference import ada_kv_kept, static_kept, threshold_kept
from fairkv_tests.core_cases import pages_by_rank, random_plan, seen_before
from fairkv_tests.fake_collectives import Collectives, Group, ranks_as_threads
from fairkv_tests.learned import write_weights

LAYERS, DIM, SLOTS, CONTEXT, ROWS = 2, 8, 600, 200, 6
SCALE = DIM**-0.5


@dataclass(frozen=True)
class Model:
    """Sizes of a model: KV heads, query heads of each; layers with a window, if it has some."""

    heads: int = 4
    group: int = 2
    sliding: Sliding | None = None

    @property
    def described(self) -> Description:
        q_heads = self.heads * self.group
        return Description(
            "tiny", LAYERS, q_heads, self.heads, DIM, q_heads * DIM, dtype_bytes=4,
            sliding=self.sliding,
        )  # fmt: skip


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
    hidden: torch.Tensor  # [L, N, hidden]
    keep: Keep = AS_SERVER
    # Start and end of each chunk that is repeated; q and k, as above, of what stands behind.
    passes: tuple[tuple[int, int, torch.Tensor, torch.Tensor], ...] = ()

    @property
    def length(self) -> int:
        return self.prefix + sum(self.chunks)


def random_prompts(
    rng: np.random.Generator,
    chunks: Sequence[Sequence[int]],
    prefix: int | Sequence[int] = 0,
    model: Model | None = None,
) -> list[Prompt]:
    """Prompts in rows 1, 2, ... with slots scattered over the pool."""
    model = model or Model()
    heads, group = model.heads, model.group
    make = torch.Generator().manual_seed(int(rng.integers(2**31)))
    free = rng.permutation(SLOTS).tolist()
    prefixes = [prefix] * len(chunks) if isinstance(prefix, int) else prefix
    prompts = []
    for row, (parts, cached) in enumerate(zip(chunks, prefixes, strict=True), 1):
        n = cached + sum(parts)
        q = torch.randn(LAYERS, n, heads, group, DIM, generator=make) * 2
        k = torch.randn(LAYERS, n, heads, DIM, generator=make)
        v = torch.randn(LAYERS, n, heads, DIM, generator=make)
        slots = torch.tensor([free.pop() for _ in range(n)])
        other = torch.Generator().manual_seed(n)  # those above are as they were without it
        hidden = torch.randn(LAYERS, n, model.described.hidden_size, generator=other)
        prompts.append(Prompt(row, list(parts), cached, q, k, v, slots, hidden))
    return prompts


class FirstNumber(Scorer):
    """A scorer for tests: a token's score is the first number of its key."""

    def score(self, q: torch.Tensor | None, k: torch.Tensor, *, scale: float) -> torch.Tensor:
        return k[: max(len(k) - self.window, 0), :, 0].T.contiguous()


def extreme_scores(rng: np.random.Generator, prompts: Sequence[Prompt]) -> None:
    """Keys whose first numbers tie, or let one head win everything."""
    for prompt in prompts:
        for layer in range(LAYERS):
            heads = prompt.k.shape[2]
            scores = rng.integers(0, int(rng.choice([1, 2, 4, 50])), prompt.k.shape[1:3])
            if rng.random() < 0.5:
                scores[:, rng.integers(heads)] += 100
            elif rng.random() < 0.5:
                scores += 100 * np.arange(heads)
            prompt.k[layer, :, :, 0] = torch.from_numpy(scores).float()


class Rank:
    """One rank: its real state, its book, and SGLang's pool with its home heads."""

    def __init__(
        self, config: FairKVConfig, model: Model, tp_size: int, rank: int, group: Group | None
    ) -> None:
        start = make_start(config, model.described, tp_size, "cuda")
        self.state = state = RankState(start, rank)
        begin(state)
        state.division = MemoryDivision(
            total_bytes=0,
            pool_tokens=SLOTS,
            pool_bytes=0,
            table_bytes=np.zeros(tp_size, dtype=np.int64),
            arena_pages=np.full(tp_size, 700),
            page_bytes=1,
            max_requests=ROWS - 1,
            max_head_tokens=CONTEXT,
        )
        self.book = state.book = make_book(
            state.heads,
            state.scope,
            state.division,
            head_dim=DIM,
            dtype=torch.float32,
            device="cpu",
            window=config.replan_window,
            verbose=config.debug.log_decisions,
            forecast_factor=config.debug.forecast_factor,
        )
        exchange = None if group is None else HomeExchange(state.heads.homes, group)  # type: ignore[arg-type]
        hand_over = HandOver(state.heads, self.book.pages, group)  # type: ignore[arg-type]
        rope = scorer_references.rope(CONTEXT, DIM)
        self.hidden = None
        if state.scorer.reads_hidden:
            where = torch.float32, torch.device("cpu")
            layers = state.scope.layers
            gates = state.scorer.gates(model.described, layers, state.heads.home, *where)
            self.hidden = HiddenScores(gates, SLOTS, len(state.heads.home), where[1])
        self.compressor = make_compressor(
            self.book, state.scorer, hand_over, exchange, rope, self.hidden
        )
        self.heads = [list(row) for row in state.heads.heads]
        homes = Homes(model.heads, tp_size)
        self.home = list(homes.heads(rank))
        # Replicas of a head divide its query heads in the order of their ranks.
        part = model.group // homes.replicas
        first = homes.ranks(self.home[0]).index(rank) * part
        self.queries = slice(first, first + part)
        # What a prompt has not written yet must not be read.
        self.pools = torch.full((LAYERS, 2, SLOTS, len(self.home), DIM), torch.nan)
        self.table = torch.zeros((ROWS, CONTEXT), dtype=torch.int32)
        self.passes: list[list[Prompt]] = []  # prompts that ended in each pass

    def write(self, prompt: Prompt, start: int, end: int) -> None:
        for layer in range(LAYERS):
            for pool, source in zip(self.pools[layer], (prompt.k, prompt.v), strict=True):
                pool[prompt.slots[start:end]] = source[layer, start:end][:, self.home]
            if self.hidden is not None:  # as a pass does, layer by layer
                hidden = prompt.hidden[layer, start:end]
                self.hidden.add(layer, hidden, prompt.slots[start:end].int())

    def admit(self, prompt: Prompt) -> None:
        self.book.admit(prompt.row, prompt.length, prompt.keep)
        self.table[prompt.row, : prompt.length] = prompt.slots.int()
        self.write(prompt, 0, prompt.prefix)

    def forward(self, parts: list[tuple[Prompt, int, int]], layers: int = LAYERS) -> None:
        """One pass over [start, end) of each prompt; with fewer layers, one that dies."""
        spans, offset = [], 0
        for prompt, start, end in parts:
            spans.append(PromptSpan(prompt.row, offset, end - start, end, prompt.length))
            offset += end - start
            self.write(prompt, start, end)
        current = ForwardSpans(tuple(spans))
        self.book.begin_forward([span.row for span in current.last])
        self.compressor.begin(current, self.table)
        for layer in range(layers):
            q = torch.cat([p.q[layer, a:b][:, self.home, self.queries] for p, a, b in parts])
            k, v = self.pools[layer]
            self.compressor.layer(layer, q, k, v, current, SCALE)
        if layers < LAYERS:
            return
        self.passes.append([p for p, _, end in parts if end == p.length])
        # SGLang gives the slots away once the result is on the host.
        for prompt in self.passes[-1]:
            self.pools[:, :, prompt.slots] = torch.nan
            for table in self.hidden._tables.values() if self.hidden is not None else ():
                table[prompt.slots] = torch.nan

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


def run_ranks(
    config: FairKVConfig,
    model: Model,
    tp_size: int,
    work: Callable[[Rank], None],
    *,
    bounded: bool = False,
    first_number: bool = False,
) -> tuple[list[Rank], Collectives]:
    """``work(rank)`` on every rank at the same time.

    Args:
        bounded: As on CUDA: sizes of what moves are only bounded, since counts stay on the device,
            and the exchange of a layer ends when the next one has been computed.
        first_number: Score with :class:`FirstNumber`.
    """
    groups = [(rank, tp_size) if tp_size > 1 else None for rank in range(tp_size)]
    ranks = [Rank(config, model, tp_size, rank, group) for rank, group in enumerate(groups)]
    if first_number:
        for rank in ranks:
            rank.compressor.scorer = FirstNumber(config.window)
    for rank in ranks:
        rank.compressor.hand_over.overlaps = bounded
    with ExitStack() as stack:
        if bounded:
            stack.enter_context(mock.patch.object(choose, "_on_host", lambda counts: None))
        _, collectives = ranks_as_threads(
            tp_size, [exchange, hand_over], lambda rank, group: work(ranks[rank])
        )
    return ranks, collectives


def settle(folder: Path, model: Model, plan: Plan, **options: object) -> FairKVConfig:
    """Configuration with this plan, and a profile where the scope needs one."""
    if options["scope"] == "head":
        shares = np.random.default_rng(5).random((LAYERS, model.heads)) ** 2
        HeadProfile(model=None, shares=shares / shares.sum(), meta={}).save(folder / "p.json")
        options["profile"] = folder / "p.json"
    scorer = SCORERS[str(options.get("scorer", "snapkv"))]
    if scorer.reads_hidden:
        weights = write_weights(folder, scorer.name, model.described, model.group)
        options["scorer_checkpoint"] = weights
    if options["scope"] == "threshold":
        options.setdefault("threshold", 0.02)
    plan.to_file(folder / "plan.json")
    values = {"enabled": True, "window": 8, "plan": folder / "plan.json", **options}
    return FairKVConfig(**values)


def home_plan(model: Model, tp_size: int) -> Plan:
    """Every head at home; one with several homes is shared by them."""
    homes = Homes(model.heads, tp_size)
    layer = homes.at_home / homes.replicas
    return Plan.from_shares(np.repeat(layer[None], LAYERS, axis=0), "contiguous")


def scores_of(config: FairKVConfig, first_number: bool, prompt: Prompt, layer: int) -> list:
    """[head][scored token] by the papers' formulae."""
    window, total = config.window, prompt.length
    if first_number:
        return prompt.k[layer, : max(total - window, 0), :, 0].T.tolist()
    found: list = scorer_references.scores(
        config.scorer,
        prompt.q[layer],
        prompt.k[layer],
        prompt.v[layer],
        scale=SCALE,
        last=CONTEXT,
        layer=layer,
        passes=[(start, end, q[layer], k[layer]) for start, end, q, k in prompt.passes],
        hidden=prompt.hidden[layer],
        **config.options("scorer"),
    ).tolist()
    return found


def as_wanted(config: FairKVConfig, keep: Keep) -> FairKVConfig:
    """The configuration of a server that has the request's scorer and scope."""
    values = config.model_dump()
    for field, own in (
        ("scorer", keep.scorer and (keep.scorer.name, asdict(keep.scorer))),
        ("scope", keep.method and (keep.method[0], dict(keep.method[1]))),
    ):
        if own is not None:
            name, options = own
            values = {k: v for k, v in values.items() if k not in config.options(field)}
            values |= {field: name, **options}
    return FairKVConfig(**values)


def expected_kept(rank: Rank, config: FairKVConfig, prompt: Prompt) -> list:
    """[layer][head] -> kept positions, by the papers' formulae."""
    first_number = isinstance(rank.compressor.scorer, FirstNumber) and prompt.keep.scorer is None
    config = as_wanted(config, prompt.keep)
    state, total = rank.state, prompt.length
    scored = range(max(total - config.window, 0))
    named = {t for start, end in prompt.keep.spans for t in range(start, end)}
    free = [t for t in scored if t not in named]  # the others are kept like the window
    order = [*free, *(t for t in range(total) if t not in free)]
    sink = config.make_scorer().sink
    window, budget = total - len(free), expected_budget(rank, prompt, total - len(free), sink)
    heads, tp_size = state.heads.plan.num_kv_heads, state.tp_size
    size = max(1, heads // tp_size) if config.scope == "rank" else heads
    result = []
    of_layers = []
    for layer in range(LAYERS):
        scores = scores_of(config, first_number, prompt, layer)
        of_layers.append([[row[t] for t in free] for row in scores])
    if config.scope == "model":
        with_budget = state.scope.layers
        rows = [row for layer in with_budget for row in of_layers[layer]]
        every = list(range(len(rows)))
        flat = ada_kv_kept(rows, every, budget, window, config.floor_alpha, total)
        result = [[] for _ in range(LAYERS)]  # other layers' are put in below
        for number, layer in enumerate(with_budget):
            result[layer] = flat[number * heads : (number + 1) * heads]
        of_layers = []
    for layer, scores in enumerate(of_layers):
        scope = prompt.keep.scope(state.scope, total)
        if not scope.input_dependent:
            assert scope.budget(total) == budget
            counts = scope.expected(total)[layer].tolist()
            result.append(static_kept(scores, counts, total))
            continue
        if config.scope == "threshold":
            options = (config.threshold, config.floor_alpha, sink)
            result.append(threshold_kept(scores, budget, window, total, *options))
            continue
        kept: list[list[int]] = []
        for first in range(0, heads, size):
            group = list(range(first, first + size))
            rows = [scores[h] for h in group]
            kept += ada_kv_kept(rows, group, budget, window, config.floor_alpha, total)
        result.append(kept)
    result = [[sorted(order[t] for t in row) for row in layer] for layer in result]
    sliding = state.scope.sliding
    if sliding is not None:
        latest = list(range(max(0, total - sliding.window + 1), total))
        result = [
            [latest] * heads if layer in sliding.layers else rows
            for layer, rows in enumerate(result)
        ]
    return result


def expected_budget(rank: Rank, prompt: Prompt, always: int, sink: int) -> int:
    """B(N) of a prompt of which ``always`` tokens are in the window or protected."""
    spec, total = prompt.keep.spec or rank.state.scope.spec, prompt.length
    share = math.ceil(Fraction(str(spec.ratio or 0)) * total)
    least = always + max(sink, 1)
    return min(max(spec.tokens or share, least), total)


def check(ranks: list[Rank], config: FairKVConfig, prompts: list[Prompt]) -> list:
    """Pages of all ranks against the formulae; returns the kept sets."""
    owners = {p.row: ranks[0].book.owners(p.row) for p in prompts}
    everything = []
    for prompt in prompts:
        kept = expected_kept(ranks[0], config, prompt)
        everything.append(kept)
        counts = torch.tensor([[len(row) for row in layer] for layer in kept])
        stored = torch.zeros_like(counts)
        for index, rank in enumerate(ranks):
            assert np.array_equal(rank.book.owners(prompt.row), owners[prompt.row])
            for layer in range(LAYERS):
                for local, head in enumerate(rank.heads[layer]):
                    lane = rank.state.heads.lane_start[layer] + local
                    k, v = torch_decode.gather(rank.book.pages, prompt.row, lane)
                    if owners[prompt.row][layer, head] != index:
                        assert len(k) == 0
                        continue
                    positions = kept[layer][head]
                    assert torch.equal(k, prompt.k[layer, positions, head]), (layer, head)
                    assert torch.equal(v, prompt.v[layer, positions, head])
                    stored[layer, head] += 1
            if prompt.keep.scope(rank.state.scope, prompt.length).input_dependent:
                noted = rank.book._lives[prompt.row].kept
                assert noted is not None and torch.equal(noted, counts)
                assert noted.dtype == torch.int64
            rank.book.hand_over(prompt.row, prompt.length)
        assert bool((stored == 1).all()), "a head has exactly one owner"
    for index, rank in enumerate(ranks):
        rank.book.pages.check_integrity()
        assert rank.book.pages.num_used == rank.book.ledger.held[index]
        assert rank.compressor.hand_over._arrival is None
        for prompt in prompts:
            # nothing is carried on: it has ended
            assert not rank.book.tails(prompt.row) and not rank.book.seen(prompt.row)
            rank.book.free(prompt.row)
        assert rank.book.check_idle() == []
    assert len({rank.book.log.digest for rank in ranks}) == 1
    return everything


def check_spills(ranks: list[Rank], config: FairKVConfig, prompts: list[Prompt]) -> int:
    """All ranks know which prompts need more pages than their charge on a rank; that one holds no
    more than this, every other has all of its part. Returns how many spilled.
    """
    spilled = 0
    for prompt in prompts:
        kept = expected_kept(ranks[0], config, prompt)
        counts = np.array([[len(row) for row in layer] for layer in kept])
        need = pages_by_rank(counts, ranks[0].book.owners(prompt.row), len(ranks))
        most = need.max() * np.ones((2, len(ranks)))
        limit, _ = ranks[0].book.charges._limited.get(prompt.row, most)
        over = need > limit
        for index, rank in enumerate(ranks):
            held = int((-(-rank.book.pages.lens[prompt.row] // PAGE_TOKENS)).sum())
            assert held <= limit[index] if over[index] else held == need[index]
            assert rank.book.hand_over(prompt.row, prompt.length) == over.any()
        spilled += bool(over.any())
    for index, rank in enumerate(ranks):
        rank.book.pages.check_integrity()
        assert rank.book.pages.num_used <= rank.book.ledger.held[index]
        for prompt in prompts:
            rank.book.free(prompt.row)
        assert rank.book.check_idle() == []
    assert len({rank.book.log.digest for rank in ranks}) == 1
    return spilled


def run_with_spills(
    folder: Path, scope: str, tp_size: int, seed: int, *, bounded: bool = False
) -> tuple[int, int]:
    """Prompts that are charged a part of what they are expected to take; see :func:`check_spills`.

    Returns:
        How many spilled, of how many.
    """
    rng, model = np.random.default_rng(seed), Model()
    plan = random_plan(rng, LAYERS, tp_size, model.heads)
    debug = {"forecast_factor": float(rng.choice([1.0, 0.7, 0.4]))}
    config = settle(folder, model, plan, scope=scope, ratio=0.4, scorer="snapkv", debug=debug)
    chunks = ([61], [40, 21], [16, 16, 16, 3], [90], [120])
    prompts = random_prompts(rng, chunks)

    def work(rank: Rank) -> None:
        seen_before([rank.book], np.random.default_rng(seed))
        for prompt in prompts:
            rank.admit(prompt)
        rank.book.ledger.capacity = rank.book.ledger.held.copy()  # nothing is free
        rank.run(prompts)

    ranks, _ = run_ranks(config, model, tp_size, work, bounded=bounded)
    return check_spills(ranks, config, prompts), len(prompts)


def source_of(homes: Homes, head: int, owner: int) -> int:
    """The home that an owner gets rows from."""
    ranks = homes.ranks(head)
    return owner if owner in ranks else ranks[owner % len(ranks)]


def waits(scope: BudgetScope) -> bool:
    """Whether tokens are selected after the last layer."""
    return scope.name == "model"


def moved_heads(
    homes: Homes, owners: dict[int, np.ndarray], ending: list[Prompt], layer: int
) -> dict[tuple[int, int, int], list[int]]:
    """Heads of the layer by number of the prompt, home and owner, where these differ."""
    moved: dict[tuple[int, int, int], list[int]] = {}
    for number, prompt in enumerate(ending):
        for head, owner in enumerate(owners[prompt.row][layer].tolist()):
            source = source_of(homes, head, owner)
            if source != owner:
                moved.setdefault((number, source, owner), []).append(head)
    return moved


def check_traffic(
    ranks: list[Rank],
    collectives: Collectives,
    owners: dict[int, np.ndarray],
    config: FairKVConfig,
    everything: dict[int, list],
    bounded: bool = False,
    at_once: int = LAYERS,
) -> None:
    """Collectives and rows are those that the owners call for, counted one head at a time; those of
    ``at_once`` layers share a collective where sizes are exact.
    """
    at_once = 1 if bounded else at_once
    state = ranks[0].state
    homes, scope = state.heads.homes, state.scope
    exchanges, gathers = 0, 0

    def together(prompt: Prompt) -> bool:
        wanted = as_wanted(config, prompt.keep)
        tova = wanted.scorer == "tova"
        return wanted.scope in ("layer", "model") or homes.replicas > 1 or tova

    rows = [0] * homes.tp_size
    for ending in ranks[0].passes:
        own = {p.row: p.keep.scope(scope, p.length) for p in ending}
        compressed = [p for p in ending if own[p.row].budget(p.length) < p.length]
        apart = [p for p in compressed if own[p.row].name in ("rank", "threshold")]
        apart = [p for p in apart if not together(p)]  # nobody knows the counts of all heads
        shared = any(together(p) for p in compressed)
        for first in range(0, LAYERS, at_once):
            now = late = budgeted = unknown = False
            for layer in range(first, min(first + at_once, LAYERS)):
                moved = {number for number, *_ in moved_heads(homes, owners, ending, layer)}
                has_budget = layer in scope.layers  # windows are known to everybody
                waiting = {n for n, p in enumerate(ending) if p in compressed and waits(own[p.row])}
                waiting = waiting if has_budget else set()
                now |= bool(moved - waiting)
                late |= bool(moved & waiting)
                budgeted |= has_budget
                unknown |= has_budget and bool(moved - waiting)
            exchanges += now + late
            if homes.tp_size > 1:
                gathers += shared and budgeted
                gathers += bool(apart) and unknown
        for layer in range(LAYERS):
            moved = moved_heads(homes, owners, ending, layer)
            for (number, source, _), heads in moved.items():
                prompt = ending[number]
                exact = sum(len(everything[prompt.row][layer][h]) for h in heads)
                most = own[prompt.row].most(layer, prompt.length, heads)
                assert exact <= most
                loose = bounded and own[prompt.row].input_dependent and prompt in compressed
                loose = loose and not waits(own[prompt.row])  # the host waits for its counts, too
                rows[source] += most if loose else exact
        gathers += len(apart) if homes.tp_size > 1 else 0
    assert collectives.count("all_to_all") == exchanges
    assert collectives.count("all_gather") == gathers
    for rank, sent in zip(ranks, rows, strict=True):
        over = rank.compressor.hand_over
        assert over.rows_sent == sent and over.row_bytes == 2 * DIM * 4

# SPDX-License-Identifier: Apache-2.0
"""Checks and times of the hand-over of kept rows: ranks in one process, on one device.

`device` is "cuda" or "cpu". UNTESTED ON A GPU: the tests run it on the CPU, with sizes that are
bounded as on a GPU.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from fairkv_sglang.attention import choose, exchange, hand_over
from fairkv_sglang.attention.compress_all import make_compressor
from fairkv_sglang.attention.exchange import HomeExchange
from fairkv_sglang.attention.forward_spans import ForwardSpans, PromptSpan
from fairkv_sglang.attention.hand_over import HandOver
from fairkv_sglang.bench.gpu.report import need
from fairkv_sglang.budgets import AS_SERVER, BudgetSpec, Scorer, make_scope, pick
from fairkv_sglang.budgets.scorers.snapkv import SnapKV
from fairkv_sglang.kernels import PAGE_TOKENS, HeadPages
from fairkv_sglang.parallel import RankHeads
from fairkv_sglang.placement import Plan
from fairkv_tests import reference
from fairkv_tests.gpu_steps import without_waiting

Group = tuple[int, int]
LAYERS, GROUP, WINDOW, BUDGET = 3, 4, 8, 64
LENGTHS = (300, 40, 151)
"""Prompts of the pass; the second is within its budget."""
SPLITS = ((8, 2), (4, 4), (2, 4))
"""KV heads and ranks; in the last one every head has two homes."""


class Ranks:
    """`torch.distributed` in memory for ranks that are threads, of which one runs at a time.

    A group is (rank, number of ranks). All ranks use one stream, so nothing waits for the device.
    """

    def __init__(self, count: int) -> None:
        self.failed, self.turn = False, threading.Condition()
        self.calls: list[list[str]] = [[] for _ in range(count)]
        self.given: dict[tuple[int, int], tuple[str, Any]] = {}  # call, rank

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(rank)` on all ranks; the first failure is raised."""
        ranks = range(len(self.calls))
        with ThreadPoolExecutor(len(ranks)) as pool:
            tasks = [pool.submit(self._alone, work, rank) for rank in ranks]
        errors = [error for task in tasks if (error := task.exception()) is not None]
        if errors:  # a KeyError is that of a rank which another one left waiting
            raise min(errors, key=lambda error: isinstance(error, KeyError))
        return [task.result() for task in tasks]

    def _alone(self, work: Callable[[int], Any], rank: int) -> Any:
        with self.turn:
            try:
                return work(rank)
            except BaseException:
                self.failed = True
                raise
            finally:
                self.turn.notify_all()

    def _post(self, rank: int, name: str, what: Any) -> Callable[[], list[Any]]:
        keys = [(len(self.calls[rank]), other) for other in range(len(self.calls))]
        self.calls[rank].append(name)
        self.given[keys[rank]] = name, what
        self.turn.notify_all()

        def collect() -> list[Any]:
            self.turn.wait_for(lambda: self.failed or self.given.keys() >= set(keys), 60)
            names, given = zip(*(self.given[key] for key in keys), strict=True)
            need(len(set(names)) == 1, f"ranks call different collectives: {names}")
            return list(given)

        return collect

    def all_gather_into_tensor(self, out: torch.Tensor, mine: torch.Tensor, group: Group) -> None:
        out.copy_(torch.cat(self._post(group[0], "all_gather", mine)()))

    def all_to_all_single(
        self,
        out: torch.Tensor,
        mine: torch.Tensor,
        out_splits: Sequence[int],
        in_splits: Sequence[int],
        group: Group,
        async_op: bool = False,
    ) -> Any:
        collect = self._post(group[0], "all_to_all", mine.split(list(in_splits)))

        def wait() -> None:
            parts = [given[group[0]] for given in collect()]
            need([len(part) for part in parts] == list(out_splits), "ranks disagree about sizes")
            out.copy_(torch.cat(parts))

        return SimpleNamespace(wait=wait) if async_op else wait()


@contextmanager
def patched(collectives: Any) -> Iterator[None]:
    """`collectives` in place of torch.distributed; counts stay on the device, as on CUDA."""
    with (
        mock.patch.object(hand_over, "dist", collectives),
        mock.patch.object(exchange, "dist", collectives),
        mock.patch.object(choose, "_on_host", lambda counts: None),
    ):
        yield


class FirstNumber(Scorer):
    """A token's score is the first number of its key: the same bits on every device."""

    needs_queries, window = False, WINDOW

    def score(self, q: torch.Tensor | None, k: torch.Tensor, *, scale: float) -> torch.Tensor:
        return k[: len(k) - self.window, :, 0].float().T.contiguous()


class Pass:
    """A pass at whose end several prompts are compressed, on all ranks of a random plan."""

    def __init__(
        self, seed: int, split: tuple[int, int], device: str, dim: int, scope: str, scorer: Scorer
    ) -> None:
        rng, (heads, ranks) = np.random.default_rng(seed), split
        make, tokens, slots = torch.Generator().manual_seed(seed), sum(LENGTHS), 512
        serves = rng.random((LAYERS, ranks, heads)) < 0.4  # any copies, nobody need be at home
        serves[:, rng.integers(ranks, size=heads), np.arange(heads)] = True
        serves[:, np.arange(ranks), rng.integers(heads, size=ranks)] = True
        plan = Plan.from_shares(serves / serves.sum(1, keepdims=True), "random")
        self.owners = [(serves * rng.random(serves.shape)).argmax(1) for _ in LENGTHS]
        self.kv = torch.randn((2, LAYERS, slots, heads, dim), generator=make).bfloat16()
        self.slots = torch.randperm(slots, generator=make)[:tokens].split(list(LENGTHS))
        table = pad_sequence([torch.empty(0), *self.slots], batch_first=True).int()
        self.table, self.rows = table.to(device), torch.arange(1, len(table), device=device)
        starts = np.cumsum((0, *LENGTHS)).tolist()
        spans = (PromptSpan(i + 1, starts[i], n, n, n) for i, n in enumerate(LENGTHS))
        self.spans, self.scorer = ForwardSpans(tuple(spans)), scorer
        self.scope = make_scope(scope, BudgetSpec(tokens=BUDGET), LAYERS, heads, scorer)
        self.scope.home_size = max(1, heads // ranks)
        self.ranks = [self._rank(RankHeads(plan, r, GROUP), device) for r in range(ranks)]
        for rank in self.ranks:
            rank.compressor.hand_over.overlaps = True  # on the CPU, too
        shape = (LAYERS, tokens, self.scope.home_size, GROUP * heads // max(heads, ranks), dim)
        self.q = torch.randn(shape, generator=make).bfloat16().to(device)

    def _rank(self, heads: RankHeads, device: str) -> Any:
        most, rows = -(-max(LENGTHS) // PAGE_TOKENS), len(LENGTHS) + 1
        sizes = (rows * heads.num_lanes * most, rows, heads.num_lanes, most)
        pages = HeadPages.create(*sizes, self.kv.shape[-1], self.kv.dtype, device)
        book: Any = SimpleNamespace(
            heads=heads, scope=self.scope, pages=pages,
            owners=lambda row: self.owners[row - 1], note_kept=lambda row, kept: None,
            tails=lambda row: {}, keep=lambda row: AS_SERVER,
        )  # fmt: skip
        group: Any = (heads.rank, heads.plan.tp_size)
        hand_over = HandOver(heads, pages, group)
        exchange = HomeExchange(heads.homes, group)
        return SimpleNamespace(
            heads=heads, pages=pages, pools=self.kv[:, :, :, list(heads.home)].to(device),
            owned=[torch.from_numpy(heads.owned(x)).to(device) for x in self.owners],
            compressor=make_compressor(book, self.scorer, hand_over, exchange),
        )  # fmt: skip

    def admit(self) -> None:
        """Give the prompts their rows, emptied."""
        for rank in self.ranks:
            rank.pages.kernels.release(rank.pages, self.rows)
            for row, owned in enumerate(rank.owned, 1):
                rank.pages.kernels.set_owned(rank.pages, row, owned)

    def run(self) -> None:
        """Compress the prompts, layer by layer."""

        def work(number: int) -> None:
            rank = self.ranks[number]
            rank.compressor.begin(self.spans, self.table)
            for layer in range(LAYERS):
                rank.compressor.layer(layer, self.q[layer], *rank.pools[:, layer], self.spans, 0.1)

        ranks = Ranks(len(self.ranks))
        with patched(ranks):
            ranks.run(work)

    def check(self) -> int:
        """Pages of all ranks against the prompts on the CPU; see `intact`."""
        for number, slots in enumerate(self.slots):
            for layer, kv in enumerate(self.kv[:, :, slots].unbind(1)):
                scores = self.scorer.score(None, kv[0], scale=1)
                counts = self.scope.counts(layer, range(len(scores)), scores, len(slots))
                kept = pick(scores, counts, len(slots))
                for rank in self.ranks:
                    first, heads = rank.heads.lane_start[layer], rank.heads.heads[layer]
                    for lane, head in enumerate(heads, first):
                        mine = self.owners[number][layer, head] == rank.heads.rank
                        want = kv[:, kept.indices[head, : int(kept.counts[head]) * mine], head]
                        got = torch.stack(reference.gather(rank.pages, number + 1, lane))
                        where = f"prompt {number}, layer {layer}, head {head}"
                        need(torch.equal(got.cpu(), want), f"{where}: other rows than kept")
        return self.intact()

    def intact(self) -> int:
        """No page is lost and no error noted; gives the rows that left a rank."""
        for rank in self.ranks:
            rank.pages.check_integrity()
        return sum(rank.compressor.hand_over.rows_sent for rank in self.ranks)


def owners_hold_what_is_kept(device: str, dim: int, rounds: int = 2) -> str:
    """Random plans and owners, with sizes that are bounded (scope layer) and known (uniform)."""
    sent = dict.fromkeys(("layer", "uniform"), 0)
    for seed, split, scope in itertools.product(range(rounds), SPLITS, sent):
        made = Pass(seed, split, device, dim, scope, FirstNumber())
        made.admit()
        made.run()
        sent[scope] += made.check()
    need(sent["layer"] > sent["uniform"] > 0, f"rows sent: {sent}")
    return f"rows sent: {sent['layer']} bounded, {sent['uniform']} known"


def no_host_synchronisation(device: str, dim: int) -> str:
    """Scores, selection, packing, storing of a rank never wait for the device, in any scope."""
    options = list(itertools.product(SPLITS, ("uniform", "rank", "layer")))
    passes = [Pass(0, split, device, dim, scope, SnapKV(WINDOW)) for split, scope in options]
    for made in passes:  # compilation may wait, and so may admission
        made.admit()
        made.run()
        made.admit()
    with without_waiting(device):
        for made in passes:
            made.run()
    for made in passes:
        made.intact()
    return f"{len(passes)} passes"

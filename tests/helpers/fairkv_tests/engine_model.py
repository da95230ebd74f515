# SPDX-License-Identifier: Apache-2.0
"""A model of SGLang's scheduler loop over real row books and head pages of several ranks.

It does what the loop does to memory, in its order: choose the next batch (admission, retraction,
growth), launch it (release, take pages), then process the result of this batch or, under overlap
scheduling, of the one before. What prompts take is charged by a forecast, which may be too low.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

import fairkv_sglang.patches.rank
from fairkv_sglang.attention.compress_outputs import OutputCompressor
from fairkv_sglang.budgets import AS_SERVER, BudgetScope, Keep, pick
from fairkv_sglang.memory.recent import RecentQueries
from fairkv_sglang.memory.rows import RowBook
from fairkv_sglang.patches import scheduling
from fairkv_sglang.patches.prefill_budget import FairKVPrefillBudget
from fairkv_sglang.patches.request_options import asking
from fairkv_sglang.patches.spills import has_spilled, mark_spilled
from fairkv_sglang.placement import Plan
from fairkv_tests.core_cases import (
    kept_counts,
    make_books,
    random_keep,
    random_scores,
    seen_before,
)

ROWS, MAX_HEAD_TOKENS, POOL = 7, 420, 460
WINDOW = 4  # of recent queries


@dataclass(eq=False)
class Request:
    prompt: int  # tokens to prefill: the prompt, after a retraction with the output so far
    want: int  # tokens of output
    keep: Keep = AS_SERVER
    outputs: int = 0
    prefilled: int = 0  # tokens of output that are part of ``prompt``
    row: int = 0
    done: int = 0  # tokens prefilled
    slots: int = 0  # held in the prefill pool
    life: int = 0  # +1 when it loses its row
    is_retracted: bool = False  # or it has ended: SGLang skips what a batch makes of it
    kept: np.ndarray | None = None  # [L, H] once the device holds its pages


@dataclass
class Batch:
    ended: list[tuple[Request, int]] = field(default_factory=list)  # prompts that end, life
    decoded: list[tuple[Request, int]] = field(default_factory=list)
    prefill: bool = False


class Allocator:
    """What the admission asks of SGLang's allocator and tree."""

    def __init__(self, engine: Engine, page_size: int) -> None:
        self.engine, self.page_size = engine, page_size

    def available_size(self) -> int:
        used = sum(-(-r.slots // self.page_size) * self.page_size for r in self.engine.alive)
        return POOL // self.page_size * self.page_size - used

    def evictable_size(self) -> int:
        return 0

    def supports_mamba(self) -> bool:
        return False


class Engine:
    """Runs random requests; every step checks the ranks' pages against their ledgers."""

    def __init__(
        self,
        rng: np.random.Generator,
        plan: Plan,
        scope: BudgetScope,
        *,
        overlap: bool,
        mixed: bool,
        chunk: int,
        page_size: int,
        forecast: float = 1.0,
        slack: int | None = None,
    ) -> None:
        self.rng, self.plan, self.scope = rng, plan, scope
        self.overlap, self.mixed, self.chunk = overlap, mixed, chunk
        lanes = (plan.shares() > 0).sum(axis=(0, 2))
        capacity = lanes * int(rng.integers(4, 30)) + rng.integers(0, 5, plan.tp_size)
        max_pages = -(-MAX_HEAD_TOKENS // 16) + 1
        self.books: list[RowBook] = make_books(
            plan,
            scope,
            capacity,
            rows=ROWS,
            max_pages=max_pages,
            pool_tokens=POOL,
            forecast_factor=forecast,
            slack=slack,
        )
        self.compressors = [self.compressor(book) for book in self.books if book.outputs]
        self.longest = 0  # output of a request that ended
        self.calm = False  # nobody aborts, pauses, or ends before it has written all
        seen_before(self.books, rng)
        self.allocator = Allocator(self, page_size)
        self.free_rows = list(range(1, ROWS))
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.chunked: Request | None = None
        self.alive: list[Request] = []  # requests that hold a row
        self.last: Batch | None = None
        self.pending: list[Batch] = []
        self.finished = self.retractions = self.aborts = self.overshoot = self.spills = 0
        self.zeros = torch.zeros((POOL, plan.num_kv_heads, 8))

    @staticmethod
    def compressor(book: RowBook) -> OutputCompressor:
        book.recent = RecentQueries(
            rows=ROWS,
            window=WINDOW,
            lanes=book.pages.lanes,
            group=2,
            head_dim=book.pages.head_dim,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        return OutputCompressor(book, WINDOW)

    # -- requests -------------------------------------------------------------------------------

    def submit(self) -> None:
        """A new request, clipped as at its arrival; dropped if it can never be served."""
        rng = self.rng
        prompt = int(rng.choice([1, 3, 17, 40, 90, 200]) + rng.integers(0, 16))
        want = int(rng.choice([1, 2, 10, 40, 1 << 30]))
        keep = random_keep(rng, self.scope)
        rank = SimpleNamespace(
            book=self.books[0],
            scope=self.scope,
            division=SimpleNamespace(
                pool_tokens=POOL // self.page_size * self.page_size,
                max_head_tokens=MAX_HEAD_TOKENS,
            ),
        )
        with mock.patch.object(fairkv_sglang.patches.rank, "_rank", rank), asking(keep):
            clipped = scheduling.around_max_new_tokens(None, self.allocator, prompt, want)
        if clipped is not None:
            self.waiting.append(Request(prompt, clipped, keep))

    @property
    def page_size(self) -> int:
        return self.allocator.page_size

    def lose_row(self, request: Request) -> None:
        for book in self.books:
            book.free(request.row)
        self.free_rows.append(request.row)
        self.alive.remove(request)
        request.row, request.slots, request.done = 0, 0, 0
        request.kept = None
        request.life += 1
        request.is_retracted = True

    def retract(self, request: Request, wait: bool = True) -> None:
        self.lose_row(request)
        request.prompt += request.outputs - request.prefilled
        request.prefilled = request.outputs
        self.retractions += 1
        if wait:
            self.waiting.append(request)

    def pause(self) -> None:
        """SGLang's pause in the mode that retracts everything, a result that is due first."""
        if self.overlap and self.last is not None:
            self.process(self.pending.pop(0))
        for request in list(self.alive):
            self.retract(request)
        self.running, self.last, self.chunked = [], None, None

    # -- one turn of the loop -------------------------------------------------------------------

    def turn(self) -> None:
        if self.chunked is not None and not self.calm and self.rng.random() < 0.05:
            self.lose_row(self.chunked)  # abort inside a chunked prefill
            self.chunked = None
            self.aborts += 1
        if not self.calm and self.rng.random() < 0.04:
            self.pause()
        batch = self.choose()
        if batch is not None:
            self.launch(batch)
            self.pending.append(batch)
        if self.overlap:
            if self.last is not None:
                self.process(self.pending.pop(0))
        elif batch is not None:
            self.process(self.pending.pop(0))
        self.last = batch
        self.check()

    def choose(self) -> Batch | None:
        if self.last is not None:
            self.running += [r for r, life in self.last.ended if r.life == life]
            if self.last.prefill and self.mixed:
                self.running += [
                    r for r, life in self.last.decoded if r.life == life and r not in self.running
                ]
        # As the hook around SGLang's search for prompts.
        spilled = [r for r in self.running if r.row in self.books[0].charges.spilled]
        for request in spilled:
            self.retract(request, wait=False)
            self.running.remove(request)
        batch = self.choose_prefill()
        self.waiting += spilled  # from the next search on
        return batch if batch is not None else self.choose_decode()

    def choose_prefill(self) -> Batch | None:
        if not self.waiting and self.chunked is None:
            return None
        mixed = self.mixed
        if self.chunked is not None:  # as the hook around SGLang's search for prompts
            mixed = mixed and same(b.ledger.can_grow(b.ledger.rows) for b in self.books)
        budgets = [
            FairKVPrefillBudget(
                self.allocator,
                self.allocator,
                book,
                num_mixed_decode_tokens=len(self.running) if mixed else 0,
            )
            for book in self.books
        ]
        for budget in budgets:
            budget.total_offset += sum(self.expected_output(budget.book, r) for r in self.running)
        left = self.chunk
        chosen: list[tuple[Request, int]] = []
        if self.chunked is not None:
            request = self.chunked
            most = same(budget.available_chunk_tokens(left) for budget in budgets)
            take = min(most, request.prompt - request.done)
            chosen.append((request, take))
            left -= take
            for budget in budgets:
                budget.reserve(take, 0, is_chunked_continuation=True)
            self.chunked = None
        for request in list(self.waiting):
            if left <= 0 or len(chosen) >= len(self.free_rows):
                break
            for book in self.books:
                book.admission.certain = has_spilled(request)
            with asking(request.keep):
                fits = same(
                    budget.has_capacity()
                    and budget.check_prefill(
                        extend_input_len=request.prompt,
                        total_tokens=request.prompt,
                        max_new_tokens=max(request.want - request.outputs, 0),
                        input_tokens=request.prompt,
                        swa_host_hit_length=0,
                        chunk_limit=left,
                    )[0]
                    for budget in budgets
                )
            if not fits:
                alone = not (self.alive or self.pending or self.running or chosen)
                assert not alone, f"{request} can never be admitted"
                break
            take = min(request.prompt, left)
            if take < request.prompt:
                take = take // self.page_size * self.page_size
                if not take:
                    break
            for budget in budgets:
                budget.reserve(take, 0)
            request.row = self.free_rows.pop()
            self.alive.append(request)
            self.waiting.remove(request)
            chosen.append((request, take))
            left -= take
        if not chosen:
            return None
        batch = Batch(prefill=True)
        for request, take in chosen:
            request.done += take
            request.slots += take
            assert self.allocator.available_size() >= 0, "prefill pool overcommitted"
            for book in self.books:
                book.admit(request.row, request.prompt, request.keep, has_spilled(request))
            request.is_retracted = False
            if request.done == request.prompt:
                batch.ended.append((request, request.life))
            else:
                assert self.chunked is None
                self.chunked = request
        if mixed:
            self.running = [r for r in self.running if r.row]
            batch.decoded = [(r, r.life) for r in self.running]
            for book in self.books:
                book.grow([r.row for r in self.running])
            self.running = []
        return batch

    @staticmethod
    def expected_output(book: RowBook, request: Request) -> float:
        kv = SimpleNamespace(holds_kv=bool(request.row), req_pool_idx=request.row)
        with mock.patch.object(fairkv_sglang.patches.rank, "_rank", SimpleNamespace(book=book)):
            return scheduling.around_running_output(
                lambda adder, req: (request.want - request.outputs) * 0.3,
                None,
                SimpleNamespace(kv=kv),
            )

    def choose_decode(self) -> Batch | None:
        self.running = [r for r in self.running if r.row]
        if not self.running:
            return None
        forced = not self.calm and self.rng.random() < 0.05 and len(self.running) > 1
        while forced or not self.decode_fits():
            forced = False
            # Alone it always fits: the clip at its arrival saw to that.
            assert len(self.running) > 1, "the last request would be aborted"
            self.retract(self.running.pop())
        for book in self.books:
            book.grow([r.row for r in self.running])
        return Batch(decoded=[(r, r.life) for r in self.running])

    def decode_fits(self) -> bool:
        rows = [r.row for r in self.running]
        return same(bool(np.all(b.ledger.growth(rows) <= b.ledger.free)) for b in self.books)

    def launch(self, batch: Batch) -> None:
        rows = torch.tensor([r.row for r, _ in batch.decoded], dtype=torch.int64)
        for book in self.books:
            book.begin_forward([r.row for r, _ in batch.ended])
            if book.outputs:
                self.compressors[book.heads.rank].step()
            if len(rows):
                slots = torch.empty((len(rows), book.pages.lanes), dtype=torch.int64)
                book.pages.kernels.grow(book.pages, rows, slots)
                owned = [book.heads.owned(book.owners(int(row))) for row in rows]
                assert torch.equal(slots >= 0, torch.from_numpy(np.stack(owned)) > 0)
        for request, _ in batch.ended:
            self.store(request)
        for rank, book in enumerate(self.books):
            assert book.pages.num_used <= book.ledger.held[rank] + self.to_shrink(book)[rank]

    @staticmethod
    def to_shrink(book: RowBook) -> np.ndarray:
        """[R] pages that the device still holds of what the ledger has given back."""
        pages = np.zeros_like(book.ledger.held)
        for due in book.outputs.due if book.outputs else ():
            pages += book.ledger.pages(due.row, due.held) - book.ledger.pages(due.row, due.counts)
        return pages

    def store(self, request: Request) -> None:
        plan, total = self.plan, request.prompt
        scope = request.keep.scope(self.scope, total)
        scores = [
            random_scores(self.rng, plan.num_kv_heads, total, scope.window)
            for _ in range(plan.num_layers)
        ]
        same(book.owners(request.row).tobytes() for book in self.books)
        kept = kept_counts(scope, plan, total, scores)
        for rank, book in enumerate(self.books):
            for layer, table in enumerate(scores):
                heads = list(plan.heads(layer, rank))
                choice = pick(table[heads], torch.from_numpy(kept[layer, heads]), total)
                pool = self.zeros[:, : len(heads)]
                book.pages.kernels.store_kept(
                    book.pages,
                    request.row,
                    book.heads.lane_start[layer],
                    pool,
                    pool,
                    torch.arange(total),
                    choice.indices,
                    choice.counts,
                )
            if scope.input_dependent:
                book.note_kept(request.row, torch.from_numpy(kept))
        request.kept = kept

    def process(self, batch: Batch) -> None:
        for request, life in batch.ended + batch.decoded:
            stale = request.life != life or request.row in self.books[0].charges.spilled
            assert request.is_retracted == stale, (
                "SGLang would use a token that is none, or lose one"
            )
            if stale:
                self.overshoot += 1
                continue
            request.outputs += 1
            ends = not self.calm and self.rng.random() < 0.03
            if request.outputs >= request.want or ends:
                self.longest = max(self.longest, request.outputs)
                self.lose_row(request)
                self.finished += 1
            elif (request, life) in batch.ended:
                seen = self.books[0].recorder.count + (
                    self.scope.input_dependent
                    and request.keep.spec is None  # else it tells nothing of the server's budget
                    and not has_spilled(request)  # else it is there already
                )
                if same(book.hand_over(request.row, request.slots) for book in self.books):
                    assert not has_spilled(request), "spilled twice"
                    mark_spilled(request)
                    self.spills += 1
                assert same(book.recorder.count for book in self.books) == seen
                request.slots = 0

    # -- checks ---------------------------------------------------------------------------------

    def check(self) -> None:
        ledgers = [book.ledger for book in self.books]
        same(ledger.held.tobytes() for ledger in ledgers)
        assert np.all(ledgers[0].held <= ledgers[0].capacity)
        same(book.log.digest for book in self.books)
        released = not self.books[0]._to_release
        if self.books[0].outputs:
            same(tuple(book.outputs.freed_pages) for book in self.books)
            released = released and not self.books[0].outputs.due
            self.check_bounds()
        quiet = released and all(
            r.kept is not None and ledgers[0].is_settled(r.row) for r in self.alive
        )
        for rank, book in enumerate(self.books):
            assert book.live_requests == len(self.alive)
            if quiet:  # every row is on the device, and known exactly
                assert book.pages.num_used == book.ledger.held[rank]

    def check_bounds(self) -> None:
        """No request holds more than it may, however long it writes."""
        book = self.books[0]
        for request in self.alive:
            bound = book.outputs.rule.bound(request.prompt, request.keep)
            if bound is None or request.kept is None or not book.ledger.is_settled(request.row):
                continue
            most = book.ledger.pages(request.row, bound.most(request.kept))
            assert np.all(book.ledger.charge(request.row) <= most)

    def drain(self) -> None:
        """Run until nothing is left, then look for leaks."""
        for _ in range(4000):
            if not (self.waiting or self.alive or self.pending or self.last):
                break
            self.turn()
        else:
            raise AssertionError("requests are stuck")
        for book in self.books:
            assert book.check_idle() == []
            assert book.pages.num_used == 0 and not book.ledger.held.any()
            book.pages.check_integrity()


def same(values):
    """The value that all ranks agree on."""
    first, *others = list(values)
    assert all(value == first for value in others), "ranks disagree"
    return first

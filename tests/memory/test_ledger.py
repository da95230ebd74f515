# SPDX-License-Identifier: Apache-2.0
"""The page ledger against a brute-force model that counts the tokens of every head."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fairkv_sglang.memory import PAGE_TOKENS, PageLedger
from fairkv_sglang.model import Sliding
from fairkv_tests.core_cases import QUICK

LAYERS, HEADS, MOST = 2, 3, 50


class Ledger(RuleBasedStateMachine):
    """``true[row]`` is [L, H] tokens of the row; known to the ledger once it is settled."""

    @initialize(
        ranks=st.integers(1, 3), pages=st.integers(10, 80), window=st.none() | st.integers(1, 40)
    )
    def start(self, ranks: int, pages: int, window: int | None) -> None:
        self.ranks = ranks
        self.sliding = None if window is None else Sliding(window, (1,))
        self.ledger = PageLedger(np.full(ranks, pages), self.sliding)
        self.owners: dict[int, np.ndarray] = {}
        self.kept: dict[int, np.ndarray] = {}
        self.decoded: dict[int, int] = {}
        self.charged: dict[int, np.ndarray] = {}  # rows that are not settled

    def pages(self, row: int, more: int = 0) -> np.ndarray:
        total = np.zeros(self.ranks, dtype=np.int64)
        for layer in range(LAYERS):
            for owner, kept in zip(self.owners[row][layer], self.kept[row][layer], strict=True):
                tokens = int(kept) + self.decoded[row] + more
                if self.sliding is not None and layer in self.sliding.layers:
                    tokens = min(tokens, self.sliding.window)
                total[owner] += sum(1 for t in range(tokens) if t % PAGE_TOKENS == 0)
        return total

    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(1, 6))
        seed = data.draw(st.integers(0, 2**32 - 1))
        rng = np.random.default_rng(seed)
        owners = rng.integers(0, self.ranks, (LAYERS, HEADS)).astype(np.int16)
        if row in self.owners:
            with pytest.raises(RuntimeError, match="twice"):
                self.ledger.admit(row, owners, np.ones(self.ranks))
            return
        kept = rng.integers(0, MOST, (LAYERS, HEADS))
        if self.sliding is not None:
            kept[1] = self.sliding.kept(int(rng.integers(0, MOST)))
        slack = rng.integers(0, 3, self.ranks)
        self.owners[row], self.kept[row], self.decoded[row] = owners, kept, 0
        bound = self.pages(row) + slack
        spare = np.bincount(owners.ravel(), minlength=self.ranks)
        if np.any(bound + spare > self.ledger.free):  # admission would say no
            del self.owners[row], self.kept[row], self.decoded[row]
            return
        self.ledger.admit(row, owners, bound)
        self.charged[row] = bound + spare

    @precondition(lambda self: self.charged)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.charged)))
        self.ledger.settle(row, self.kept[row])
        del self.charged[row]

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), times=st.integers(1, 20))
    def grow(self, data: st.DataObject, times: int) -> None:
        rows = sorted(data.draw(st.sets(st.sampled_from(sorted(self.owners)), min_size=1)))
        for _ in range(times):
            need = np.zeros(self.ranks, dtype=np.int64)
            for row in rows:
                if row not in self.charged:
                    need += self.pages(row, 1) - self.pages(row)
            assert np.array_equal(self.ledger.growth(rows), need)
            assert np.array_equal(self.ledger.growth_in_rings(), self.to_come())
            held = self.ledger.held.copy()
            outran = [r for r in rows if r in self.charged and self.decoded[r] >= PAGE_TOKENS]
            if np.any(need > self.ledger.free):
                with pytest.raises(RuntimeError, match="exhausted"):
                    self.ledger.grow(rows)
                assert np.array_equal(self.ledger.held, held)
                return
            if outran:
                with pytest.raises(RuntimeError, match="unsettled"):
                    self.ledger.grow(outran[:1])
                return
            self.ledger.grow(rows)
            for row in rows:
                self.decoded[row] += 1

    def to_come(self) -> np.ndarray:
        """Pages of layer 1 between now and a full window, of rows whose counts are known."""
        total = np.zeros(self.ranks, dtype=np.int64)
        for row, owners in self.owners.items():
            if self.sliding is not None and row not in self.charged:
                held = min(int(self.kept[row][1, 0]) + self.decoded[row], self.sliding.window)
                each = sum(1 for t in range(held, self.sliding.window) if t % PAGE_TOKENS == 0)
                total += each * np.bincount(owners[1], minlength=self.ranks)
        return total

    @rule(row=st.integers(1, 6))
    def release(self, row: int) -> None:
        self.ledger.release(row)
        held = self.ledger.held.copy()
        self.ledger.release(row)  # again: nothing happens
        assert np.array_equal(self.ledger.held, held)
        for table in (self.owners, self.kept, self.decoded, self.charged):
            table.pop(row, None)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "ledger"):
            return
        exact = np.zeros(self.ranks, dtype=np.int64)
        charged = np.zeros(self.ranks, dtype=np.int64)
        for row in self.owners:
            exact += self.pages(row)
            charged += self.charged.get(row, self.pages(row))
            assert self.ledger.is_settled(row) == (row not in self.charged)
            assert np.array_equal(self.ledger.owners(row), self.owners[row])
        assert np.array_equal(self.ledger.held, charged)
        assert np.all(exact <= self.ledger.held)
        assert np.all(self.ledger.held <= self.ledger.capacity) and np.all(self.ledger.held >= 0)
        assert np.array_equal(self.ledger.free, self.ledger.capacity - charged)
        assert sorted(self.ledger.rows) == sorted(self.owners) and len(self.ledger) == len(
            self.owners
        )


TestLedger = Ledger.TestCase
TestLedger.settings = settings(QUICK, max_examples=60, stateful_step_count=25)


def test_clear_forgets_everything() -> None:
    ledger = PageLedger(np.array([20, 20]))
    ledger.admit(3, np.array([[0, 1]], dtype=np.int16), np.array([2, 4]))
    assert 3 in ledger and ledger.held.tolist() == [3, 5]
    ledger.clear()
    assert 3 not in ledger and ledger.held.tolist() == [0, 0]
    ledger.admit(3, np.array([[1, 1]], dtype=np.int16), np.array([0, 4]))
    assert ledger.held.tolist() == [0, 6]

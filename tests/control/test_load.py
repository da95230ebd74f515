# SPDX-License-Identifier: Apache-2.0
"""The load that routers see: what is free on the rank with least room."""

from __future__ import annotations

import numpy as np
import pytest

from fairkv_sglang.budgets import BudgetScope, BudgetSpec, make_scope
from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.control.load import load_of
from fairkv_sglang.memory.rows import RowBook
from fairkv_sglang.placement import Plan
from fairkv_tests.core_cases import make_books

LAYERS, HEADS = 2, 4
SHARES = np.zeros((LAYERS, 2, HEADS))
SHARES[:, 0, :3] = 1.0  # rank 0 has three heads of each layer, rank 1 one
SHARES[:, 1, 3] = 1.0


def scope() -> BudgetScope:
    scorer = FairKVConfig(enabled=True, scope="uniform").make_scorer()
    return make_scope("uniform", BudgetSpec(None, 0.25, None, None), LAYERS, HEADS, scorer, None)


@pytest.fixture
def book() -> RowBook:
    return make_books(Plan.from_shares(SHARES, "test"), scope(), np.array([120, 60]))[0]


def test_an_empty_server(book: RowBook) -> None:
    load = load_of(book, pool_usage=0.0)
    # rank 0: 120 pages of 16 tokens for 6 lanes; rank 1: 60 for 2
    assert (load.used, load.total, load.kept, load.usage) == (0, 320, 1.0, 0.0)


def test_the_fullest_rank_decides(book: RowBook) -> None:
    book.admit(1, 800)
    assert book.ledger.is_settled(1)  # 200 tokens of each head: 13 pages of each lane
    load = load_of(book, pool_usage=0.0)
    assert book.ledger.held.tolist() == [6 * 13, 2 * 13]
    assert load.used == 320 - (120 - 78) * 16 // 6 == 208
    assert load.usage == 208 / 320
    assert load.kept == 0.25


def test_a_full_prefill_pool_leaves_no_room(book: RowBook) -> None:
    assert load_of(book, pool_usage=0.5).used == 160
    book.admit(1, 800)
    assert load_of(book, pool_usage=0.5).used == 208
    assert load_of(book, pool_usage=1.0).usage == 1.0

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.placement import CostModel, Plan, Router, make_plan
from fairkv_sglang.placement.homes import Homes


def make(layers: int, heads: int, ranks: int, seed: int, spread: float = 0.3) -> Plan:
    loads = np.random.default_rng(seed).lognormal(0, 1, (layers, heads)) * 100
    return make_plan("fair_copying", loads, ranks, spread=spread)


@settings(deadline=None, max_examples=30)
@given(
    heads=st.integers(1, 6),
    ranks=st.integers(1, 5),
    seed=st.integers(0, 1000),
    moves=st.lists(st.integers(0, 2), max_size=25),
)
def test_owners_serve_the_head_and_loads_add_up(
    heads: int, ranks: int, seed: int, moves: list[int]
) -> None:
    plan = make(2, heads, ranks, seed)
    router, again = Router(plan), Router(plan)
    rng = np.random.default_rng(seed)
    shares = plan.shares()
    owners: dict[int, np.ndarray] = {}
    tokens: dict[int, np.ndarray] = {}
    key = 0
    for move in moves:
        if move == 0 or not owners:
            expected = rng.integers(0, 1000, (2, heads)) * 1.0
            owners[key] = router.admit(key, expected)
            np.testing.assert_array_equal(owners[key], again.admit(key, expected))
            tokens[key] = expected
            key += 1
        elif move == 1:
            chosen = list(owners)[int(rng.integers(len(owners)))]
            tokens[chosen] = rng.integers(0, 1000, (2, heads)) * 1.0
            router.update(chosen, tokens[chosen])
            again.update(chosen, tokens[chosen])
        else:
            chosen = list(owners)[int(rng.integers(len(owners)))]
            router.release(chosen)
            again.release(chosen)
            del owners[chosen], tokens[chosen]
    held = np.zeros((2, ranks), dtype=np.int64)
    for chosen, rows in owners.items():
        assert rows.dtype == np.int16
        for layer in range(2):
            for head in range(heads):
                assert shares[layer, rows[layer, head], head] > 0
                held[layer, rows[layer, head]] += int(tokens[chosen][layer, head])
    np.testing.assert_array_equal(router.loads(), held)
    np.testing.assert_array_equal(again.loads(), held)
    for chosen in owners:
        router.release(chosen)
    assert not router.loads().any()


@settings(deadline=None, max_examples=30)
@given(
    heads=st.integers(1, 6),
    ranks=st.integers(1, 5),
    seed=st.integers(0, 1000),
    moves=st.lists(st.integers(0, 3), max_size=25),
)
def test_lanes_change_under_residents(heads: int, ranks: int, seed: int, moves: list[int]) -> None:
    """Residents keep owners and loads, new ones get lanes that are served now, and every rank that
    sees the same calls chooses alike.
    """
    plan = make(2, heads, ranks, seed)
    router, again = Router(plan), Router(plan)
    rng = np.random.default_rng(seed)
    served = plan.shares() > 0
    held: dict[int, np.ndarray] = {}  # [L, R] of each request
    key = 0
    for move in moves:
        before = router.loads()
        if move == 0:
            served = rng.random((2, ranks, heads)) < 0.4
            served[:, rng.integers(ranks, size=heads), np.arange(heads)] = True
            router.set_lanes(served)
            again.set_lanes(served)
            np.testing.assert_array_equal(router.loads(), before)
        elif move == 1 and held:
            gone = list(held)[int(rng.integers(len(held)))]
            router.release(gone)
            again.release(gone)
            np.testing.assert_array_equal(before - router.loads(), held.pop(gone))
        else:
            tokens = rng.integers(0, 1000, (2, heads))
            owners = router.admit(key, tokens)
            np.testing.assert_array_equal(owners, again.admit(key, tokens))
            layer, head = np.indices((2, heads))
            assert served[layer, owners, head].all()
            held[key] = router.loads() - before
            key += 1
    for gone in held:
        router.release(gone)
    assert not router.loads().any()


def test_a_router_with_new_lanes_is_one_that_was_made_with_them() -> None:
    first, then = make(3, 6, 4, 0), make(3, 6, 4, 1)
    changed, made = Router(first), Router(then)
    changed.set_lanes(then.shares() > 0)
    for key in range(20):
        tokens = np.random.default_rng(key).integers(0, 1000, (3, 6))
        np.testing.assert_array_equal(changed.admit(key, tokens), made.admit(key, tokens))


def test_lanes_that_leave_out_a_head_are_refused() -> None:
    router = Router(make(2, 3, 2, 0))
    before = router.admit(0, np.ones((2, 3)))
    for served, message in (
        (np.ones((2, 3, 2)), r"shape \(2, 2, 3\), got \(2, 3, 2\)"),
        (np.arange(12).reshape(2, 2, 3) > 5, "layer 0: head 0 is served by no rank"),
    ):
        with pytest.raises(ValueError, match=message):
            router.set_lanes(served)
    router.release(0)
    np.testing.assert_array_equal(router.admit(0, np.ones((2, 3))), before)


def test_one_hot_head_is_dealt_out_evenly() -> None:
    loads = np.array([[700.0, 100.0, 100.0, 100.0]])
    plan = make_plan("fair_copying", loads, 4, spread=0.3)
    router = Router(plan)
    for key in range(64):
        router.admit(key, loads)
    held = router.loads()[0]
    assert held.max() / held.mean() < 1.05


def test_very_different_lengths_stay_balanced() -> None:
    rng = np.random.default_rng(0)
    loads = rng.lognormal(0, 1, (8, 8)) * 100
    router = Router(make_plan("fair_copying", loads, 4, spread=0.5))
    for key in range(64):
        router.admit(key, loads * rng.lognormal(0, 1.5))
    held = router.loads()
    assert held.max(axis=1).sum() / held.mean(axis=1).sum() < 1.1


def test_later_requests_make_up_for_what_residents_really_hold() -> None:
    plan = Plan.from_shares(np.array([[[0.5], [0.5]]]), "test")
    router = Router(plan)
    first = int(router.admit(0, [[10.0]])[0, 0])
    router.update(0, [[1000.0]])
    later = [int(router.admit(key, [[10.0]])[0, 0]) for key in range(1, 6)]
    assert set(later) == {1 - first}


def test_weight_slices_count_where_the_plan_has_a_cost_model() -> None:
    shares = np.array([[[0.5, 1.0, 1.0, 0.0], [0.5, 0.0, 0.0, 1.0]]])
    plain = Router(Plan.from_shares(shares, "test"))
    weighted = Router(Plan.from_shares(shares, "test", info={"lane_tokens": 100}))
    expected = [[10.0, 1.0, 1.0, 3.0]]
    assert plain.admit(0, expected)[0, 0] == 0
    assert weighted.admit(0, expected)[0, 0] == 1
    made = make_plan("fair_copying", np.ones((1, 2)), 2, CostModel())
    assert made.info["lane_tokens"] == 20480  # 10.5 MB / 512 bytes


def test_wrong_use_gives_one_line() -> None:
    router = Router(make(2, 3, 2, 0))
    router.admit(1, np.ones((2, 3)))
    for call, message in (
        (lambda: router.admit(1, np.ones((2, 3))), "request 1 is admitted already"),
        (lambda: router.release(2), "request 2 is not admitted"),
        (lambda: router.update(2, np.ones((2, 3))), "request 2 is not admitted"),
        (lambda: router.update(1, np.ones((3, 2))), r"shape \(2, 3\), got \(3, 2\)"),
        (lambda: router.admit(3, -np.ones((2, 3))), ">= 0"),
        (lambda: router.admit(3, np.full((2, 3), np.nan)), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="lane_tokens"):
        Router(Plan.from_shares(np.ones((1, 1, 1)), "test", info={"lane_tokens": -1}))


def test_same_owners_in_every_process() -> None:
    code = (
        "import numpy as np, hashlib\n"
        "from fairkv_sglang.placement import Router, make_plan\n"
        "rng = np.random.default_rng(3)\n"
        "x = rng.lognormal(0, 1, (6, 8)) * 100\n"
        "router = Router(make_plan('fair_copying', x, 8, spread=.3))\n"
        "text = b''\n"
        "for key in range(40):\n"
        "    text += router.admit(key, x).tobytes()\n"
        "    router.update(key, x * rng.lognormal(0, .3, x.shape))\n"
        "    if key > 20: router.release(key - 20)\n"
        "print(hashlib.sha256(text).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@given(heads=st.integers(1, 6), replicas=st.integers(1, 3), tokens=st.integers(0, 1000))
def test_equally_loaded_ranks_leave_a_head_at_home(heads: int, replicas: int, tokens: int) -> None:
    ranks = heads * replicas
    plan = Plan.from_shares(np.full((2, ranks, heads), 1 / ranks), "everyone serves everything")
    owners = Router(plan).admit(0, np.full((2, heads), tokens))
    home = Homes(heads, ranks).at_home
    assert all(home[owner, head] for row in owners for head, owner in enumerate(row))


def test_the_lower_rank_is_taken_where_there_is_no_home() -> None:
    shares = np.array([[[0.0, 1.0], [0.5, 0.0], [0.5, 0.0], [0.0, 0.0]]])
    shares[0, 3] = shares[0, 0] = [0.0, 0.5]  # homes of head 0 are 0 and 1, of head 1 are 2 and 3
    assert Router(Plan.from_shares(shares, "test")).admit(0, [[5.0, 5.0]]).tolist() == [[1, 3]]
    three = Plan.from_shares(np.array([[[0.5, 0.5], [0.5, 0.0], [0.0, 0.5]]]), "no homes")
    assert Router(three).admit(0, [[5.0, 0.0]])[0, 0] == 0

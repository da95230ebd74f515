# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fairkv_sglang.placement import Plan, make_plan
from fairkv_sglang.placement.requests import read_requests
from fairkv_sglang.placement.simulate import Traffic, simulate

TRAFFIC = Traffic(batch=8, steps=40, shortest=4, longest=16)


def requests_file(tmp_path: Path, lengths: list[int]) -> Path:
    """A file in Tangram's form: prompts of the same length keep the same tokens."""
    kept = []
    for length in lengths:
        extra = np.random.default_rng(length).lognormal(0, 1, (3, 4)) * 100
        kept.append((4128 + extra).round().tolist())
    samples = [[length, 32, length + 32, 4096] for length in lengths]
    path = tmp_path / "requests.json"
    path.write_text(json.dumps({"kept": kept, "samples": samples, "meta": {"model_name": "m"}}))
    return path


def test_halves_share_no_prompt(tmp_path: Path) -> None:
    lengths = [300, 100, 200, 100, 300, 400]
    requests = read_requests(requests_file(tmp_path, lengths), budget=512, window=32)
    one, two = requests.halves()
    assert sorted([*one, *two]) == list(range(6))
    assert not {lengths[i] for i in one} & {lengths[i] for i in two}


def test_kept_tokens_are_scaled_to_the_budget(tmp_path: Path) -> None:
    path = requests_file(tmp_path, [100, 200])
    plain = read_requests(path, budget=512, window=32, floor=0.0).kept
    floored = read_requests(path, budget=512, window=32, floor=0.2).kept
    np.testing.assert_allclose(plain.mean(axis=(1, 2)), 512)
    np.testing.assert_allclose(floored.mean(axis=(1, 2)), 512)
    assert floored.min() >= 32 + 0.2 * 480
    np.testing.assert_allclose(floored, 0.8 * plain + 0.2 * 512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "not a file of requests"),
        ("[", "not a file of requests"),
        ('{"kept": [[1]], "samples": [[1, 2, 3, 4]]}', "expected"),
        ('{"kept": [[[1, 2]]], "samples": [[9, 0, 9, 5]]}', "keeps nothing besides"),
    ],
)
def test_broken_request_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_requests(path)


def test_bad_request_options(tmp_path: Path) -> None:
    path = requests_file(tmp_path, [100])
    with pytest.raises(ValueError, match="floor must be between 0 and 1"):
        read_requests(path, floor=2.0)
    with pytest.raises(ValueError, match="below the budget"):
        read_requests(path, budget=16, window=32)
    with pytest.raises(ValueError, match="cannot read requests"):
        read_requests(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="must not be above longest"):
        Traffic(shortest=10, longest=5)


def test_equal_heads_are_perfectly_balanced() -> None:
    kept = np.full((3, 2, 4), 100.0)
    plan = make_plan("contiguous", kept[0], 4)
    replay = simulate(plan, kept, kept[0], TRAFFIC)
    assert replay.imbalance == 1.0
    assert replay.requests > TRAFFIC.batch  # some left and were replaced


def test_contiguous_shows_the_imbalance_of_the_loads() -> None:
    kept = np.array([[[300.0, 100.0]]])
    replay = simulate(make_plan("contiguous", kept[0], 2), kept, kept[0], TRAFFIC)
    np.testing.assert_allclose(replay.series, 1.5)
    shared = make_plan("fair_copying", kept[0], 2, spread=0.3)
    assert simulate(shared, kept, kept[0], TRAFFIC).imbalance < 1.1


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("growth", [True, False])
def test_same_seed_same_replay(exact: bool, growth: bool) -> None:
    kept = np.random.default_rng(0).lognormal(0, 1, (5, 3, 4)) * 100
    mean = kept.mean(axis=0)
    plan = make_plan("fair_copying", mean, 4, samples=kept)
    traffic = TRAFFIC.model_copy(update={"exact": exact, "growth": growth, "length_spread": 0.5})
    one, two = (simulate(plan, kept, mean, traffic) for _ in range(2))
    np.testing.assert_array_equal(one.fullest, two.fullest)
    np.testing.assert_array_equal(one.mean, two.mean)
    other = simulate(plan, kept, mean, traffic.model_copy(update={"seed": 1}))
    assert not np.array_equal(one.fullest, other.fullest)


def test_a_new_plan_takes_over_as_residents_leave() -> None:
    """Two kinds of requests: the plan is made from the first, its lanes serve the second."""
    kinds = np.random.default_rng(0).lognormal(0, 1.0, (2, 3, 8)) * 100
    first, later = (np.repeat(kind[None], 5, axis=0) for kind in kinds)
    plain = make_plan("contiguous", np.ones((3, 8)), 4)
    seen = []

    def replan(requests: np.ndarray) -> Plan:
        seen.append(requests)
        return make_plan("fair_copying", later[0], 4, max_lanes=3, samples=later)

    traffic = TRAFFIC.model_copy(update={"steps": 120})
    replay = simulate(plain, first, first[0], traffic, None, (20, replan, later))
    assert [len(requests) for requests in seen] == [20]
    np.testing.assert_array_equal(seen[0], np.repeat(first[:1], 20, axis=0))
    stock = simulate(plain, first, first[0], traffic, None, (20, lambda _: plain, later))
    before, after = slice(replay.replanned), slice(replay.drained, None)
    assert 0 < replay.replanned < replay.drained <= replay.replanned + traffic.longest
    assert (stock.replanned, stock.drained) == (replay.replanned, replay.drained)
    np.testing.assert_array_equal(replay.fullest[before], stock.fullest[before])
    np.testing.assert_allclose(replay.mean, stock.mean)  # the same requests
    assert replay.imbalance_of(after) < 1.15 < stock.imbalance_of(after)
    assert replay.plan.policy == "fair_copying" and stock.plan is plain


def test_growth_adds_one_token_per_head_and_step() -> None:
    kept = np.full((1, 1, 2), 10.0)
    plan = make_plan("contiguous", kept[0], 2)
    traffic = Traffic(batch=1, steps=3, shortest=1000, longest=1000, growth=True, seed=5)
    replay = simulate(plan, kept, kept[0], traffic)
    np.testing.assert_allclose(replay.mean, [10.0, 11.0, 12.0])


def test_requests_of_another_model_are_refused() -> None:
    plan = make_plan("contiguous", np.ones((2, 4)), 2)
    with pytest.raises(ValueError, match="kept must have the shape"):
        simulate(plan, np.ones((3, 2, 5)), np.ones((2, 4)), TRAFFIC)

# SPDX-License-Identifier: Apache-2.0
"""Plans of a server that adapts: lane slots at start, plans from traffic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_sglang.cli.main import main
from fairkv_sglang.config import from_mapping
from fairkv_sglang.model import Model
from fairkv_sglang.placement import Plan, make_plan
from fairkv_sglang.planning import Start, make_start
from fairkv_sglang.profiles import HeadProfile
from fairkv_sglang.profiles.recorder import Recorder

LAYERS, HEADS = 3, 8


@pytest.fixture
def profile(tmp_path: Path) -> str:
    shares = np.random.default_rng(0).lognormal(0.0, 1.5, (LAYERS, HEADS))
    path = tmp_path / "profile.json"
    HeadProfile("m", shares).save(path)
    return str(path)


MODEL = Model("m", LAYERS, HEADS * 4, HEADS, 128, 4096)


def start(ranks: int, device: str = "cuda", made: Plan | None = None, **options: Any) -> Start:
    config = from_mapping({"enabled": True, "expected_batch": 64, **options})
    return make_start(config, MODEL, ranks, device, made)


def most_lanes(plan: Plan) -> int:
    return int((plan.shares() > 0).sum(axis=2).max())


def traffic(seed: int) -> Recorder:
    recorder = Recorder(LAYERS, HEADS, 32)
    rng = np.random.default_rng(seed)
    base = rng.lognormal(6.0, 1.0, (LAYERS, HEADS))
    for _ in range(32):
        kept = base * rng.lognormal(0.0, 0.3, base.shape)
        recorder.add(kept.astype(np.int64), 4096)
    return recorder


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("placement", ["fair_copying", "best_effort", "equal_shares"])
def test_the_start_plan_fits_the_slots(
    profile: str, device: str, ranks: int, placement: str
) -> None:
    home = HEADS // ranks
    for options, slots in (({}, home + 1), ({"spare_lanes": 9}, 8)):
        made = start(ranks, device, profile=profile, placement=placement, **options)
        assert most_lanes(made.plan) <= slots == made.slots
        assert made.plan.info["lane_slots"] == slots


@pytest.mark.parametrize("ranks", [2, 8])
def test_lanes_that_never_change_have_no_slots(profile: str, ranks: int) -> None:
    """Nor where no lane could change: without a spare one every slot holds the only copy."""
    for options in (
        {"replan": "off"},
        {"scope": "head"},
        {"scope": "uniform"},
        {"spare_lanes": 0},
        {"placement": "contiguous"},
    ):
        made = start(ranks, profile=profile, **options)
        assert made.slots is None and "lane_slots" not in made.plan.info
    assert start(1, profile=profile).slots is None


def test_a_plan_file_has_the_slots_that_it_needs(tmp_path: Path) -> None:
    wide = np.full((LAYERS, 4, HEADS), 0.25)
    Plan.from_shares(wide, "all everywhere").to_file(tmp_path / "plan.json")
    made = start(4, plan=str(tmp_path / "plan.json"), scope="uniform")
    np.testing.assert_array_equal(made.plan.shares(), wide)
    assert made.slots == HEADS
    even = make_plan("contiguous", np.ones((LAYERS, HEADS)), 4)
    assert start(4, made=even, scope="uniform", spare_lanes=1).slots == 3


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_plan_from_traffic_follows_it_within_the_slots(tmp_path: Path, device: str) -> None:
    even = make_plan("contiguous", np.ones((LAYERS, HEADS)), 4)
    even.to_file(tmp_path / "plan.json")
    for options in ({}, {"plan": str(tmp_path / "plan.json")}):
        planner = start(4, device, **options).planner
        assert planner.slots == 3
        for seed in (0, 1):
            seen = traffic(seed)
            plan = planner.from_requests(seen.requests())
            assert most_lanes(plan) <= 3
            old, new = (
                np.einsum("lrh,lh->lr", p.shares(), seen.mean()).max(axis=1).sum()
                for p in (even, plan)
            )
            assert new < 0.95 * old
            again = planner.from_requests(traffic(seed).requests())
            assert again.digest == plan.digest


def test_budgets_that_no_prompt_changes_need_no_room_for_it() -> None:
    same = Recorder(LAYERS, HEADS, 4)
    for length in (100, 400):
        same.add(np.full((LAYERS, HEADS), length), 4 * length)
    planner = start(4, "cpu", scope="uniform", spare_lanes=1).planner
    plan = planner.from_requests(same.requests())
    assert plan.copy_counts().sum() == 0


def test_simulate_starts_even_and_adapts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = np.random.default_rng(1).lognormal(0, 1.0, (4, 8)) * 100
    noise = np.random.default_rng(2).lognormal(0, 0.2, (6, 4, 8))
    kept = (4128 + base * noise).round().tolist()
    samples = [[1000 + i, 32, 1032 + i, 4096] for i in range(6)]
    path = tmp_path / "requests.json"
    path.write_text(json.dumps({"kept": kept, "samples": samples}))
    words = ["simulate", str(path), "--tp", "4", "--budget", "8192", "--longest", "100"]
    assert main([*words, "--adapt", "48", "--steps", "300", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert max(row["after"]) < min(row["between"]) < min(row["plain"])
    assert row["spare"] == 1 and max(row["step"]) < 1.0
    assert main([*words, "--adapt", "48", "--spare-lanes", "2"]) == 0
    assert "plan from the first 48 prompts" in capsys.readouterr().out
    assert main([*words, "--adapt", "48", "--steps", "20"]) == 2
    assert "--steps 20 is too few" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""The plan reaches the ranks unchanged, or they refuse it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.patches import server_args
from fairkv_sglang.placement import CostModel, Plan, make_plan
from fairkv_sglang.plan_file import PLAN_VARIABLE, hand_out, received


def some_plan(seed: int = 0, ranks: int = 2) -> Plan:
    loads = np.random.default_rng(seed).lognormal(6, 1, (3, 4))
    return make_plan("fair_copying", loads, ranks, CostModel(batch=64), model="m", spread=0.3)


@settings(deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4, 8]))
def test_ranks_get_what_the_parent_made(seed: int, ranks: int) -> None:
    plan = some_plan(seed, ranks)
    value = hand_out(plan)
    got = received({PLAN_VARIABLE: value})
    assert got == plan and got.digest == plan.digest == json.loads(value)["digest"]
    assert Path(json.loads(value)["path"]).stat().st_mode & 0o077 == 0


def test_nothing_handed_out() -> None:
    assert received({}) is None and received({PLAN_VARIABLE: ""}) is None


def test_another_plan_is_refused() -> None:
    value = hand_out(some_plan())
    path = Path(json.loads(value)["path"])
    some_plan(1).to_file(path)
    with pytest.raises(ValueError, match=r"^FairKV: the plan .* has the digest .*start again$"):
        received({PLAN_VARIABLE: value})
    path.unlink()
    with pytest.raises(ValueError, match=r"^FairKV: the parent's plan .* cannot be read: No such"):
        received({PLAN_VARIABLE: value})


def test_file_goes_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, numpy as np\n"
        "from fairkv_sglang.placement import Plan\n"
        "from fairkv_sglang.plan_file import hand_out\n"
        "print(hand_out(Plan.from_shares(np.ones((1, 1, 2)), 'one')), flush=True)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    raise SystemExit\n"  # a forked child runs the exit handlers, too
        "os.waitpid(child, 0)\n"
        "print(len(os.listdir(os.environ['TMPDIR'])), flush=True)\n"
    )
    folder = tmp_path
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env={"TMPDIR": str(folder)},
    )  # fmt: skip
    value, held = done.stdout.splitlines()
    assert held == "1" and not Path(json.loads(value)["path"]).exists()


def test_starting_puts_the_variable_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLAN_VARIABLE, "another start's")
    with server_args.starting(FairKVConfig(enabled=True)):
        monkeypatch.setenv(PLAN_VARIABLE, hand_out(some_plan()))
    assert server_args.os.environ[PLAN_VARIABLE] == "another start's"

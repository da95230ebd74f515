# SPDX-License-Identifier: Apache-2.0
"""``fairkv check``: what a start would do, said before a weight is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fairkv_sglang.cli.preview import describe
from fairkv_sglang.config import from_mapping
from fairkv_sglang.model import Model
from fairkv_sglang.profiles import HeadProfile
from fairkv_sglang.support import check_start
from fairkv_tests.plugin_folder import install_plugin

MODEL = Model("m", num_layers=3, num_q_heads=16, num_kv_heads=8, head_dim=64, hidden_size=512)


def test_budgets_and_plan_of_a_start(tmp_path: Path) -> None:
    shares = np.ones((3, 8))
    shares[:, 0] = 12.0
    profile = tmp_path / "profile.json"
    HeadProfile(model="m", shares=shares, meta={}).save(profile)
    options = {"enabled": True, "budget": 256, "profile": str(profile), "expected_prompt": 2048}
    plain, fair = (
        describe(check_start(config, MODEL, 4, "cuda"))
        for config in (from_mapping({**options, "placement": "contiguous"}), from_mapping(options))
    )
    assert plain["rows that stay at home"] == "100.0%"
    assert plain["decode twins, all ranks and fullest (MB)"] == "0.0, 0.0"
    assert plain["copies"] == 0 and plain["fullest rank over mean"] > 1.5
    assert fair["fullest rank over mean"] < plain["fullest rank over mean"]
    for start in (plain, fair):
        assert sum(rank["tokens"] for rank in start["ranks"]) == pytest.approx(3 * 8 * 256, abs=4)
    assert sum(rank["lanes"] for rank in fair["ranks"]) == 24 + fair["copies"]


_CHECKS = """
import json, sys
from fairkv_sglang.cli.main import main
for words in json.loads(sys.argv[1]):
    try:
        status = main(["check", *words])
    except SystemExit as end:
        status = end.code
    print("status", status)
"""


@pytest.mark.slow
def test_launch_flags_are_validated_and_explained(tiny_model: Callable[..., Path]) -> None:
    """In a process of its own, because the hooks are put into SGLang."""
    launch = ["--model-path", str(tiny_model()), "--tp", "2", "--device", "cpu", "--fairkv"]
    good = ["--json", *launch, "--fairkv-ratio", "0.5"]
    typo = [*launch, "--fairkv-budgets", "128"]
    bad = ["--", *launch, "--fairkv-scope", "layr"]
    done = subprocess.run(
        [sys.executable, "-c", _CHECKS, json.dumps([good, typo, bad])],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    ends = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert ends == ["status 0", "status 2", "status 2"], done.stderr
    start, _ = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])
    assert start["budget"] == "50% of the prompt" and len(start["ranks"]) == 2
    lines = done.stderr.splitlines()
    assert "error: there is no flag --fairkv-budgets: did you mean --fairkv-budget?" in lines
    assert not any(line.startswith("usage:") for line in lines)
    assert "did you mean layer?" in lines[-1]


HOPELESS = {
    "--fairkv-decode-backend flashinfer": "flashinfer",
    "--fairkv-prefill-pool 1": "a prefill pool of 1 tokens holds no prompt",
    "--fairkv-prefill-pool 999999999": "give a smaller --fairkv-prefill-pool",
    "--max-total-tokens 4096 --fairkv-prefill-pool 4096": "give a smaller --fairkv-prefill-pool",
    "--max-total-tokens 4096 --fairkv-arena-pages 1": "room for 1 head pages",
    "--fairkv-max-head-tokens 1": "heads of 1 tokens hold no prompt",
    "--tp 0": "--tp-size 0: give the number of ranks",
    "--device cuda": "torch finds no CUDA device",
}
"""What passed until a rank had its weights, and what is wrong with it."""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of it works with a GPU")
def test_what_no_start_survives_is_refused_before_weights(tiny_model: Callable[..., Path]) -> None:
    """One line each; the parent's hooks are the same for a server and for the check."""
    model = ["--model-path", str(tiny_model()), "--fairkv"]
    starts = [[*model, *flags.split()] for flags in HOPELESS]
    done = subprocess.run(
        [sys.executable, "-c", _CHECKS, json.dumps([[*model, "--device", "cpu"], *starts])],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    ends = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert ends == ["status 0", *["status 2"] * len(HOPELESS)], done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(HOPELESS) and "Traceback" not in done.stderr
    for line, message in zip(lines, HOPELESS.values(), strict=True):
        assert message in line


def _try_out(path: str = "") -> tuple[int, dict[str, tuple[bool, str]]]:
    """Status and rows of ``fairkv check``, ``path`` in front of what Python finds otherwise."""
    parts = [path, os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "fairkv_sglang.cli.main", "check", "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, parts))},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    rows = json.loads(done.stdout[done.stdout.index("[") :])
    return done.returncode, {row["check"]: (row["ok"], row["detail"]) for row in rows}


@pytest.mark.engine
@pytest.mark.smoke
def test_an_installation_is_tried_out_to_the_first_tokens() -> None:
    status, rows = _try_out()
    assert status == 0, rows
    assert list(rows) == ["sglang version", "plugin", "device", "kernels", "hooks", "start"]
    assert "decoded 8 tokens" in rows["start"][1]


# What the hooks do not touch, as on 0.5.22 for a FairKV that knew 0.5.21 only.
_GONE = """
sys.modules["sglang.srt.mem_cache.unified_radix_cache"] = None
"""


@pytest.mark.engine
def test_an_sglang_on_which_ranks_would_die_is_found_out(tmp_path: Path) -> None:
    status, rows = _try_out(str(install_plugin(tmp_path, "changed_sglang", _GONE)))
    assert status == 1 and rows["hooks"][0]
    ok, detail = rows["start"]
    assert not ok and "cannot start" in detail and "mem_cache.unified_radix_cache" in detail

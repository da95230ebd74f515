# SPDX-License-Identifier: Apache-2.0
"""Planned decode time on real profiles is no worse than that of earlier code.

``planned_steps.json`` holds sum over layers of the fullest rank's modelled cost, by scope, kind of
device and TP size, for plans that a server made with default settings at the commit it names. Up
to 726a5cf these were figures of 7b7ac06, from before prefill had a split of its own; then Ada-KV's
floor became a guarantee, which changed the loads, and they were made anew by the same planner.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fairkv_sglang.config import from_mapping
from fairkv_sglang.model import Model
from fairkv_sglang.placement.solver.stay import SAME
from fairkv_sglang.planning import make_start
from fairkv_sglang.profiles import read_profile

COLLECTED = Path(__file__).resolve().parents[3] / "shared" / "profiles"
BEFORE: dict[str, dict[str, float]] = json.loads(
    (Path(__file__).parent / "planned_steps.json").read_text()
)["steps"]
# group, head_dim, hidden_size of the public model configs; Llama-3.1-8B's for the others
SIZES = {
    "Llama-2-7B": (1, 128, 4096),
    "Qwen2.5-7B": (7, 128, 3584),
    "gemma-3-4b": (2, 256, 2560),
    "qwen3-30b": (8, 128, 2048),
}


@pytest.mark.parametrize("name", sorted(BEFORE))
def test_planned_decode_time(name: str) -> None:
    path = COLLECTED / name
    if not path.exists():
        pytest.skip("the collected profiles are not here")
    group, head_dim, hidden = next((v for k, v in SIZES.items() if k in name), (4, 128, 4096))
    layers, heads = read_profile(path).shares.shape
    for case, before in BEFORE[name].items():
        scope_name, device, ranks = case.split()
        # without lane slots, whose weights count on CUDA
        options = {"enabled": True, "profile": str(path), "scope": scope_name, "replan": "off"}
        config = from_mapping(options)
        width = 2 if device == "cuda" else 4
        model = Model("m", layers, heads * group, heads, head_dim, hidden, dtype_bytes=width)
        plan = make_start(config, model, int(ranks), device).plan
        assert plan.info["step_cost"] <= before * SAME, case
        assert (heads % int(ranks) and int(ranks) % heads) or plan.info["home_rows"] > 0.25, case

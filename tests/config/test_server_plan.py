# SPDX-License-Identifier: Apache-2.0
"""The plan that a server makes for itself from its options, model and kind of device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.config import from_mapping
from fairkv_sglang.model import Model
from fairkv_sglang.placement import Plan
from fairkv_sglang.placement.cost import DEVICES
from fairkv_sglang.planning import make_start
from fairkv_sglang.profiles import HeadProfile

LAYERS, HEADS = 3, 8


def plan_of(tmp_path: Path, device: str = "cuda", **options: Any) -> Plan:
    shares = np.ones((LAYERS, HEADS))
    shares[:, 2] = 40.0
    profile = tmp_path / "profile.json"
    HeadProfile(model="m", shares=shares, meta={}).save(profile)
    config = from_mapping(
        {
            "enabled": True, "budget": 1024, "scope": "head", "profile": str(profile),
            "expected_prompt": 16384, "expected_batch": 64, **options,
        }
    )  # fmt: skip
    model = Model("m", LAYERS, HEADS * 4, HEADS, 128, 4096)
    return make_start(config, model, 2, device).plan


def test_constants_are_those_of_the_device(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        model = plan_of(tmp_path, device).info["cost_model"]
        assert {key: model[key] for key in DEVICES[device]} == DEVICES[device]
        assert model["batch"] == 64

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_sglang.placement import CostModel
from fairkv_sglang.placement.make import make_problem
from fairkv_sglang.placement.model import ModelShape
from fairkv_sglang.placement.solver.problem import lower_bound

LLAMA = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "torch_dtype": "bfloat16",
}


def test_bytes_of_llama_3_8b() -> None:
    cost = CostModel()
    assert (
        cost.slice_bytes == (32 * 128 * 2 + 8 * 128 * 2) * 4096 * 2 / 8
    )  # q, o, k, v over 8 heads
    assert cost.token_bytes == 512


def test_rank_costs_count_lanes_and_shares() -> None:
    cost = CostModel(head_dim=2, hidden_size=3, group=1, weight_bytes=1.0, kv_bytes=1.0, batch=10.0)
    shares = np.array([[[1.0, 0.25], [0.0, 0.75]]])
    rows = make_problem([[5.0, 4.0]], 2, cost).rank_costs(shares)
    lane, zero, one = 4 * 2 * 3, 10 * 5 * 4, 10 * 4 * 4
    np.testing.assert_allclose(rows, [[2 * lane + zero + one / 4, lane + 0.75 * one]])


def test_projections_take_the_longer_of_reading_and_computing() -> None:
    sizes = {"head_dim": 2, "hidden_size": 5, "group": 1, "weight_bytes": 2.0}
    small, large = (CostModel(batch=b, ops_per_byte=10.0, **sizes) for b in (1, 30))  # type: ignore[arg-type]
    assert small.lane_cost == small.slice_bytes == 4 * 2 * 5 * 2
    assert large.lane_cost == 2 * 40 * 30 / 10
    assert CostModel(batch=30, **sizes).lane_cost == 80  # type: ignore[arg-type]


def test_activations_count_for_every_request_of_a_lane() -> None:
    sizes = {"head_dim": 2, "hidden_size": 5, "group": 1, "batch": 3.0, "kv_bytes": 4.0}
    more = CostModel(activation_passes=7.0, **sizes).lane_cost - CostModel(**sizes).lane_cost  # type: ignore[arg-type]
    assert more == 3 * 7 * (4 * 2) * 4


def test_lower_bound() -> None:
    np.testing.assert_allclose(lower_bound(np.array([[3.0, 1.0]]), 2, 0.0), [2.0])
    # 2 ranks, lanes of 10: two lanes without a copy, 3 with one
    np.testing.assert_allclose(lower_bound(np.array([[100.0, 0.0]]), 2, 10.0), [65.0], rtol=1e-6)
    np.testing.assert_allclose(lower_bound(np.array([[5.0, 5.0]]), 2, 10.0), [15.0], rtol=1e-6)


def config(tmp_path: Path, **changes: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return tmp_path


def test_model_config(tmp_path: Path) -> None:
    shape = ModelShape.from_config(config(tmp_path))
    assert (shape.num_layers, shape.num_kv_heads, shape.group_size) == (32, 8, 4)
    assert (shape.head_dim, shape.hidden_size, shape.dtype_bytes) == (128, 4096, 2)
    assert ModelShape.from_config(config(tmp_path, head_dim=64)).head_dim == 64
    assert ModelShape.from_config(config(tmp_path, num_key_value_heads=None)).group_size == 1
    nested = config(tmp_path, num_attention_heads=None, text_config=LLAMA)
    assert ModelShape.from_config(nested / "config.json").num_kv_heads == 8


@pytest.mark.parametrize(("dtype", "width"), [("auto", 2), ("bfloat16", 2), ("float32", 4)])
def test_width_is_that_of_the_servers_dtype(tmp_path: Path, dtype: str, width: int) -> None:
    path = config(tmp_path, torch_dtype="float32")
    assert ModelShape.from_config(path, dtype).dtype_bytes == width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size are needed"),
        ({"num_key_value_heads": 5}, "32 query heads are no multiple of 5 KV heads"),
    ],
)
def test_bad_model_config(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelShape.from_config(config(tmp_path, **changes))


def test_missing_model_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read model config"):
        ModelShape.from_config(tmp_path / "no.json")

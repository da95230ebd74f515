# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np

from fairkv_sglang.placement import CostModel
from fairkv_sglang.placement.make import make_problem
from fairkv_sglang.placement.solver.problem import lower_bound


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

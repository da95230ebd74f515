# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fairkv_sglang.placement import POLICIES, HeadShare, Plan, make_plan


def _plan(layers: list[list[list[tuple[int, float]]]], heads: int = 2) -> Plan:
    return Plan(
        policy="test",
        tp_size=len(layers[0]),
        num_layers=len(layers),
        num_kv_heads=heads,
        layers=tuple(
            tuple(tuple(HeadShare(head=h, share=s) for h, s in row) for row in layer)
            for layer in layers
        ),
    )


GOOD = [[[(0, 1.0), (1, 0.25)], [(1, 0.75)]], [[(1, 1.0)], [(0, 1.0)]]]


def test_reading() -> None:
    plan = _plan(GOOD)
    assert plan.heads(0, 0) == (0, 1)
    assert plan.lane_start(0).tolist() == [0, 2, 3]
    assert plan.lane_start(1).tolist() == [0, 1, 2]
    assert plan.copies() == [[(0,), (0, 1)], [(1,), (0,)]]
    assert plan.copy_counts().tolist() == [1, 0]
    np.testing.assert_array_equal(plan.shares()[0], [[1.0, 0.25], [0.0, 0.75]])


def test_lanes_keep_any_order() -> None:
    plan = _plan([[[(1, 1.0), (0, 1.0)], [(2, 1.0)]]], heads=3)
    assert Plan.from_json(plan.to_json()).heads(0, 0) == (1, 0)


@pytest.mark.parametrize(
    ("layers", "heads", "message"),
    [
        ([[[(0, 1.0)], [(0, 1.0)]]], 1, "summing to 2"),
        ([[[(0, 1.0)], [(1, 0.5)]]], 2, "summing to 0.5"),
        ([[[(0, 1.0)], [(1, 1.0)]]], 3, "head 2 is served by no rank"),
        ([[[(0, 0.5), (0, 0.5)], [(1, 1.0)]]], 2, "serves head 0 twice"),
        ([[[(0, 1.0), (1, 1.0)], []]], 2, "rank 1 serves no head"),
        ([[[(0, 1.0)], [(1, 1.0), (5, 1.0)]]], 2, "head 5 does not exist"),
    ],
)
def test_invalid_plans(
    layers: list[list[list[tuple[int, float]]]], heads: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _plan(layers, heads)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "invalid JSON"),
        ("[]", "expected a JSON object"),
        ('{"layers": [3]}', "lists of"),
        ('{"layers": []}', "tp_size"),
        ('{"format": "fairkv-profile", "layers": []}', "fairkv-plan"),
    ],
)
def test_broken_files_give_one_line(text: str, message: str, tmp_path: object) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Plan.from_json(text)
    assert "\n" not in str(caught.value)


def test_the_least_that_a_plan_file_must_say() -> None:
    text = """{"format": "fairkv-plan", "version": 1, "tp_size": 2, "num_layers": 1,
               "num_kv_heads": 2, "layers": [[[[0, 1.0]], [[1, 1.0]]]]}"""
    plan = Plan.from_json(text)
    assert plan.heads(0, 1) == (1,)
    assert '"format": "fairkv-plan"' in plan.to_json()


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ('{"token_imbalance": NaN}', "not finite"),
        ('{"elsewhere": [{"step": -Infinity}]}', "not finite"),
        ('{"elsewhere": 1e999}', "not finite"),
        ('{"elsewhere": 99999999999999999999}', "more than 64 bits"),
        ('{"home_rows": "all"}', "info.home_rows must be a number, got 'all'"),
        ('{"lane_tokens": true}', "info.lane_tokens must be a number"),
        ('{"twin_bytes": null}', "info.twin_bytes must be a number"),
        ("[1]", "info"),
    ],
)
def test_figures_that_would_end_a_server_are_refused(info: str, message: str) -> None:
    """They go out with its state."""
    text = _plan(GOOD).to_json().replace('"info": {}', f'"info": {info}')
    assert info in text
    with pytest.raises(ValueError, match=message) as caught:
        Plan.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["tp_size", "num_layers", "num_kv_heads"])
def test_sizes_that_no_model_has_are_refused(field: str) -> None:
    text = re.sub(f'"{field}": [0-9]+', f'"{field}": 1000000000000', _plan(GOOD).to_json())
    with pytest.raises(ValueError, match=f"{field}.*less than or equal to 65536"):
        Plan.from_json(text)


def test_newer_version_is_refused() -> None:
    text = _plan(GOOD).to_json().replace('"version": 1', '"version": 9')
    with pytest.raises(ValueError, match="version 9 is not supported"):
        Plan.from_json(text)


@given(
    loads=hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 3), st.integers(1, 6)),
        elements=st.floats(0, 1e6, allow_subnormal=False),
    ),
    ranks=st.integers(1, 5),
    policy=st.sampled_from(sorted(set(POLICIES) - {"exact"})),
)
def test_round_trip_is_lossless(loads: np.ndarray, ranks: int, policy: str) -> None:
    plan = make_plan(policy, loads, ranks, model="some/model")
    again = Plan.from_json(plan.to_json())
    assert again == plan
    np.testing.assert_array_equal(again.shares(), plan.shares())

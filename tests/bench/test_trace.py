# SPDX-License-Identifier: Apache-2.0
"""From marks of the ranks to waiting, communication and the speed-up that balance allows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fairkv_sglang.bench.trace import Recorder, steady, summarise


def recording(compute: list[float], collective: list[float], steps: int = 6) -> dict[str, Any]:
    """Equal steps of one rank; the period is 10 ms longer than the step."""
    wall = np.empty(len(compute) + len(collective))
    wall[0::2], wall[1::2] = compute, collective
    period = wall.sum() + 0.010
    return {
        "batch": np.full(steps, 4),
        "forward": np.arange(steps) + 7,
        "start": np.arange(steps) * period,
        "wall": np.tile(wall, (steps, 1)),
        "cpu": np.tile(wall, (steps, 1)),
        "prefill_seconds": 0.5,
        "loads": None,
    }


def test_the_slower_rank_makes_the_other_wait() -> None:
    # layer 1: 30 against 10 ms, layer 2: 20 against 40 ms; communication 1 ms each; tail 5 ms
    slow_first = recording([0.030, 0.020, 0.005], [0.001, 0.021])
    slow_second = recording([0.010, 0.040, 0.005], [0.021, 0.001])
    found = summarise([slow_first, slow_second])
    assert found["steps"] == 6 and found["batch"] == found["peak_batch"] == 4
    assert found["communication_ms"] == pytest.approx(2)
    assert found["waiting_ms"] == pytest.approx([20, 20])
    assert found["compute_ms"] == pytest.approx([55, 55])  # equal sums hide the imbalance
    assert found["slowest_ms"] == pytest.approx(75)
    assert found["even_ms"] == pytest.approx(55)
    assert found["removable_ms"] == pytest.approx(20)
    assert found["period_ms"] == pytest.approx(87)
    assert found["allowed_speedup"] == pytest.approx(87 / 67)
    assert found["cpu_imbalance"] == pytest.approx(75 / 55)
    assert found["prefill_s"] == [0.5, 0.5]
    json.dumps(found, allow_nan=False)


def test_noise_that_hits_either_rank_is_not_imbalance() -> None:
    generator = np.random.default_rng(0)
    ranks = [recording([0.010, 0.010], [0.001], steps=400) for _ in range(2)]
    for rank in ranks:
        late = generator.random(400) < 0.2
        rank["wall"][late, 0] *= 3
    assert summarise(ranks)["imbalance"] == pytest.approx(1.0)


def test_balanced_ranks_allow_nothing() -> None:
    one = recording([0.010, 0.010], [0.002])
    found = summarise([one, one])
    assert found["allowed_speedup"] == pytest.approx(1)
    assert found["waiting_ms"] == pytest.approx([0, 0])


def test_a_single_rank_has_no_collectives() -> None:
    found = summarise([recording([0.010], [])])
    assert found["collectives"] == 0 and found["imbalance"] == 1
    assert found["communication_ms"] == 0


def test_only_steps_of_the_steady_batch_count() -> None:
    assert steady(np.array([8] * 20 + [3] * 20)).sum() == 20
    assert (
        steady(np.array([9] + [8] * 30 + [1] * 10)).tolist() == [False] + [True] * 30 + [False] * 10
    )


def test_a_prefill_pass_between_two_steps_is_not_part_of_a_period() -> None:
    one = recording([0.010], [], steps=6)
    gap = np.array([0, 0, 0, 1, 1, 1])
    one["forward"] = one["forward"] + gap
    one["start"] = one["start"] + gap * 5.0
    assert summarise([one])["period_ms"] == pytest.approx(20)


def test_nothing_recorded() -> None:
    assert summarise([Recorder().take()]) == {"steps": 0, "prefill_s": [0.0]}


def test_ranks_that_ran_different_steps_are_refused() -> None:
    one, two = recording([0.01], []), recording([0.01], [], steps=5)
    with pytest.raises(ValueError, match="different numbers"):
        summarise([one, two])
    other = recording([0.01], [])
    other["batch"] = other["batch"] + 1
    with pytest.raises(ValueError, match="different batches"):
        summarise([one, other])


def test_balancedness_counts_the_fullest_rank_of_each_layer() -> None:
    one = recording([0.010], [])
    one["loads"] = np.array([[30.0, 10.0], [10.0, 30.0]])
    found = summarise([one])
    assert found["rank_tokens"] == [40, 40]
    assert found["balancedness"] == pytest.approx(40 / 60)


def test_the_recorder_cuts_steps_at_marks_and_starts_anew() -> None:
    recorder = Recorder()
    recorder.mark()  # outside of a step: nothing
    assert not recorder.in_step
    for batch in (2, 3, 3):
        recorder.forwards += 1
        recorder.begin(batch)
        assert recorder.in_step
        recorder.mark()
        recorder.mark()
        assert recorder.end() == (recorder.forwards < 3)  # a larger batch than before
    recorder.begin(9)
    recorder.end()  # a step without collectives is not of the usual form
    data = recorder.take()
    assert data["batch"].tolist() == [2, 3, 3]
    assert data["wall"].shape == data["cpu"].shape == (3, 3)
    assert (data["wall"] >= 0).all() and (np.diff(data["start"]) > 0).all()
    assert len(recorder.take()["batch"]) == 0

# SPDX-License-Identifier: Apache-2.0
"""From marks of the ranks to waiting, communication and the speed-up that balance allows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fairkv_sglang.bench.engine.trace import steady, summarise
from fairkv_sglang.patches.stretches import StretchRecorder


def recording(compute: list[float], collective: list[float], steps: int = 6) -> dict[str, Any]:
    """Equal steps of one rank; the period is 10 ms longer than the step."""
    wall = np.empty(len(compute) + len(collective))
    wall[0::2], wall[1::2] = compute, collective
    return recorded(np.tile(wall, (steps, 1)), wall.sum() + 0.010)


def recorded(wall: NDArray[np.float64], period: float) -> dict[str, Any]:
    """What a rank hands over whose steps have these stretches ``[steps, 2n + 1]``."""
    ends = np.pad(wall.cumsum(axis=1), ((0, 0), (1, 0)))
    marks = [[(i * period + at, i * period + at) for at in row] for i, row in enumerate(ends)]
    steps = [(4, i + 7, row) for i, row in enumerate(marks)]
    return {"steps": steps, "prefill_seconds": 0.5, "loads": None}


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
    assert found["period_ms"] == pytest.approx(87)
    assert found["allowed_speedup"] == pytest.approx(87 / 67)
    assert found["cpu_imbalance"] == pytest.approx(75 / 55)
    assert found["prefill_s"] == [0.5, 0.5]
    json.dumps(found, allow_nan=False)


def test_noise_that_hits_either_rank_is_not_imbalance() -> None:
    generator = np.random.default_rng(0)
    ranks = []
    for _ in range(2):
        wall = np.tile([0.010, 0.001, 0.010], (400, 1))
        wall[generator.random(400) < 0.2, 0] *= 3
        ranks.append(recorded(wall, 0.05))
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
    for i, (batch, forward, marks) in enumerate(one["steps"]):
        late = [(wall + 5, cpu) for wall, cpu in marks]
        one["steps"][i] = (batch, forward + 1, late) if i >= 3 else (batch, forward, marks)
    assert summarise([one])["period_ms"] == pytest.approx(20)


def test_nothing_recorded() -> None:
    assert summarise([StretchRecorder().take()]) == {"steps": 0, "prefill_s": [0.0]}


def test_ranks_that_ran_different_steps_are_refused() -> None:
    one, two = recording([0.01], []), recording([0.01], [], steps=5)
    with pytest.raises(ValueError, match="different numbers"):
        summarise([one, two])
    other = recording([0.01], [])
    other["steps"] = [(5, *step[1:]) for step in other["steps"]]
    with pytest.raises(ValueError, match="different batches"):
        summarise([one, other])


def test_balancedness_counts_the_fullest_rank_of_each_layer() -> None:
    one = recording([0.010], [])
    one["loads"] = [[30.0, 10.0], [10.0, 30.0]]
    found = summarise([one])
    assert found["rank_tokens"] == [40, 40]
    assert found["balancedness"] == pytest.approx(40 / 60)


def test_the_recorder_cuts_steps_at_marks_and_starts_anew() -> None:
    recorder = StretchRecorder()
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
    taken = recorder.take()
    assert [(batch, forward) for batch, forward, _ in taken["steps"]] == [
        (2, 1), (3, 2), (3, 3), (9, 3)
    ]  # fmt: skip
    found = summarise([taken])
    assert (found["steps"], found["batch"], found["collectives"]) == (2, 3, 1)
    assert found["period_ms"] >= found["compute_ms"][0] > 0
    assert recorder.take()["steps"] == []

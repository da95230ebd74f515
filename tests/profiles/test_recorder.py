# SPDX-License-Identifier: Apache-2.0
"""The recorder against a plain list of prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.profiles import HeadProfile, Recorder

Prompts = list[tuple[np.ndarray, int]]


@st.composite
def traffic(draw: st.DrawFn, fewest: int = 0) -> tuple[Prompts, int]:
    """Prompts of one model, as ``(kept [L, H], length)``, and a window."""
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    window, count = draw(st.integers(1, 7)), draw(st.integers(fewest, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from([np.int32, np.int64]))
    top = draw(st.sampled_from([2, 100, 2**20]))
    made = rng.integers(0, top, (count, layers, heads)).astype(kind)
    return [(kept, int(rng.integers(1, 10**6))) for kept in made], window


def _fed(prompts: Prompts, window: int, shape: tuple[int, int]) -> Recorder:
    recorder = Recorder(*shape, window)
    for kept, length in prompts:
        recorder.add(kept, length)
    return recorder


def _shape(prompts: Prompts) -> tuple[int, int]:
    return prompts[0][0].shape if prompts else (2, 2)  # type: ignore[return-value]


@settings(max_examples=100, deadline=None)
@given(traffic())
def test_window_is_that_of_a_list(case: tuple[Prompts, int]) -> None:
    prompts, window = case
    shape = _shape(prompts)
    recorder = Recorder(*shape, window)
    for number, (kept, length) in enumerate(prompts, start=1):
        recorder.add(kept, length)
        last = prompts[:number][-window:]
        assert (recorder.count, recorder.prompts) == (number, len(last))
        assert recorder.prompt_tokens == sum(tokens for _, tokens in last)
        assert recorder.summary()["kept_tokens"] == sum(int(x.sum()) for x, _ in last)
        assert (recorder.requests() == np.stack([x for x, _ in last])).all()
        # the integer sum, divided once: equal to the last bit
        assert (
            recorder.mean() == np.sum([x for x, _ in last], axis=0, dtype=np.int64) / len(last)
        ).all()
    if not prompts:
        assert recorder.prompts == 0 and not recorder.mean().any() and recorder.spread() == 0.0


@settings(max_examples=60, deadline=None)
@given(traffic(fewest=1))
def test_history_before_the_window_leaves_no_trace(case: tuple[Prompts, int]) -> None:
    """Equal on two recorders fed the same, and on one that has seen the window's prompts only."""
    prompts, window = case
    shape = _shape(prompts)
    both = [_fed(prompts, window, shape) for _ in range(2)]
    young = _fed(prompts[-window:], window, shape)
    used = _fed(prompts[::-1], window, shape)
    used.clear()
    assert used.count == used.prompts == 0 and not used.mean().any()
    for kept, length in prompts[-window:]:
        used.add(kept, length)
    for other in (both[1], young, used):
        assert (other.mean() == both[0].mean()).all()
        assert other.spread() == both[0].spread()
        assert {**other.summary(), "count": 0} == {**both[0].summary(), "count": 0}


@settings(max_examples=60, deadline=None)
@given(traffic(fewest=2), st.integers(1, 50))
def test_spread_does_not_see_the_length_of_prompts(case: tuple[Prompts, int], factor: int) -> None:
    prompts, window = case
    shape = _shape(prompts)
    plain = _fed(prompts, window, shape).spread()
    longer = [
        (kept.astype(np.int64) * (factor if i % 2 else 1), n) for i, (kept, n) in enumerate(prompts)
    ]
    assert _fed(longer, window, shape).spread() == pytest.approx(plain, rel=1e-9)
    assert 0.0 <= plain <= np.sqrt(window) * (1.0 + 1e-9)
    same = [(prompts[0][0], 1)] * 3
    assert _fed(same, 3, shape).spread() == pytest.approx(0.0, abs=1e-12)


def test_spread_is_the_variation_that_was_put_in() -> None:
    rng = np.random.default_rng(0)
    sigma = np.sqrt(np.log1p(0.6**2))
    base = 1000.0 * rng.lognormal(0.0, 1.0, (4, 64))
    drawn = base * np.exp(sigma * rng.standard_normal((400, 4, 64)) - sigma**2 / 2)
    recorder = _fed([(np.rint(kept).astype(np.int64), 1) for kept in drawn], 400, (4, 64))
    assert recorder.spread() == pytest.approx(0.6, rel=0.1)


def test_profile_and_summary() -> None:
    recorder = Recorder(2, 2, window=2)
    with pytest.raises(ValueError, match="no prompt has been recorded"):
        recorder.profile("m")
    for kept in ([[9, 9], [9, 9]], [[4, 2], [0, 2]], [[8, 2], [0, 6]]):
        recorder.add(np.array(kept), 100)
    profile = recorder.profile("m", scorer="snapkv")
    assert isinstance(profile, HeadProfile) and profile.model == "m"
    np.testing.assert_allclose(profile.shares, np.array([[6, 2], [0, 4]]) / 12)
    assert profile.meta["scorer"] == "snapkv" and profile.meta["prompts"] == 2
    summary = recorder.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["hottest"][0] == [0, 0, 2.0]
    assert (summary["prompts"], summary["count"], summary["prompt_tokens"]) == (2, 3, 200)
    assert summary["layer_max_over_mean"] == pytest.approx((6 / 4 + 4 / 2) / 2)


@pytest.mark.parametrize(
    "kept", [np.zeros((2, 3), int), np.zeros((2, 2)), np.zeros(2, int), np.zeros((1, 2, 2), int)]
)
def test_what_is_no_count_is_refused_and_leaves_nothing(kept: np.ndarray) -> None:
    recorder = Recorder(2, 2, window=3)
    with pytest.raises(ValueError, match=r"integers \[2, 2\]"):
        recorder.add(kept, 10)
    assert recorder.count == 0 and not recorder.mean().any()


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Recorder(*sizes)

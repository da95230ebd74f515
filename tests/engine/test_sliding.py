# SPDX-License-Identifier: Apache-2.0
"""Layers with a sliding window, beside layers with budgets: what identity (``test_identity.py``)
and budgets (``test_placement.py``) leave open.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairkv_tests.engine_process import EngineProcess
from fairkv_tests.tiny_models import SLIDING_WINDOW, random_prompts
from fairkv_tests.workloads import (
    CHECKS,
    ENGINE,
    KV_HEADS,
    LAYERS,
    MODEL,
    STRESS,
    STRESS_TOKENS,
    write_plan,
)

FULL_LAYER = 1  # of three; layers 0 and 2 have the window


@pytest.mark.sweep
@pytest.mark.parametrize(("family", "tp_size"), [("gemma3", 2), ("gemma3", 4), ("gpt_oss", 2)])
def test_stock_sglangs_tokens_through_retractions(
    stock: Callable[[str], Any], tmp_path: Path, family: str, tp_size: int
) -> None:
    """Whole prompts, a random placement, small mixed chunks, prefix hits, an arena that is too
    small; outputs of up to 250 tokens go around in a window of 40 many times.
    """
    reference = stock(family)
    engine = EngineProcess(
        reference.model,
        tmp_path / "log",
        fairkv={
            "ratio": 1.0,
            "plan": write_plan(tmp_path, tp_size, 21),
            "replan": "off",
            "arena_pages": 1400 // tp_size,
            "prefill_pool": 1600,
        },
        environment=CHECKS,
        tp_size=tp_size,
        max_total_tokens=16_384,
        max_running_requests=12,
        chunked_prefill_size=64,
        enable_mixed_chunk=True,
        schedule_conservativeness=0.01,
    )
    try:
        assert engine.generate_each(STRESS, STRESS_TOKENS) == reference.stress_outputs
        assert "Retract requests" in engine.log
        _nothing_is_held(engine)
    finally:
        engine.close()


@pytest.mark.sweep
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_what_each_layer_keeps_and_what_a_long_output_takes(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Layers with the window keep it of any prompt, and take no page once it is full."""
    engine = EngineProcess(
        tiny_model(architecture=family, **MODEL),
        tmp_path / "log",
        fairkv={"ratio": 0.25, "scope": "uniform"},
        environment=CHECKS,
        **ENGINE,
    )
    lengths, output = [20, 600, 1000], 200
    kept_of_each = [20, 150, 250]  # less than the scorer's window and a token is no budget
    try:
        outputs = engine.generate(random_prompts(lengths, 500, seed=8), output)
        assert [len(tokens) for tokens in outputs] == [output] * len(lengths)
        kept = engine.fairkv()["kept"]["tokens"]
        rank = _nothing_is_held(engine)
    finally:
        engine.close()
    in_window = sum(min(n, SLIDING_WINDOW - 1) for n in lengths)
    every = [in_window if layer != FULL_LAYER else sum(kept_of_each) for layer in range(LAYERS)]
    assert kept == [[tokens] * KV_HEADS for tokens in every]
    pages = sum(-(-(tokens + output) // 16) for tokens in kept_of_each)
    pages += (LAYERS - 1) * len(lengths) * -(-SLIDING_WINDOW // 16)
    assert rank["peak_pages_charged"] == KV_HEADS * pages


def _nothing_is_held(engine: EngineProcess) -> dict[str, Any]:
    """A rank's state after SGLang's idle check had its turn."""
    time.sleep(2)
    state = engine.fairkv()
    for rank in state["ranks"]:
        for key in ("pages_used", "pages_charged", "tokens_stored", "requests", "pool_tokens_held"):
            assert rank[key] == 0
    assert state["rank_loads"] == [0] * len(state["ranks"])
    assert "leak" not in engine.log
    return dict(state["ranks"][0])

# SPDX-License-Identifier: Apache-2.0
"""Quality: the demo model still recalls with a quarter of its cache, and not by luck."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind everything else: kernels/ must not be found first

from demo.prompts import is_exact, make_prompts  # noqa: E402

MODEL = ROOT / "demo" / "model"
PROMPTS = make_prompts(seed=41_000, count=32, tokens=1024, facts=8)


def recalled(engine: Any) -> int:
    """How many of the prompts are answered exactly, end of sequence included."""
    answers = engine.generate([prompt.token_ids for prompt in PROMPTS], new_tokens=6)
    return sum(is_exact(prompt, answer) for prompt, answer in zip(PROMPTS, answers, strict=True))


@pytest.mark.parametrize(
    ("fairkv", "at_least", "at_most"),
    [
        pytest.param(
            {"ratio": 0.25, "scorer": "snapkv", "scope": "layer"}, 30, 32, marks=pytest.mark.smoke
        ),
        # The same memory without looking at the prompt: what is in the middle is lost.
        pytest.param(
            {"ratio": 0.25, "scorer": "streaming", "scope": "uniform"},
            0,
            16,
            marks=pytest.mark.sweep,
        ),
    ],
    ids=["snapkv-layer", "streaming-uniform"],
)
def test_recall_at_a_quarter_of_the_cache(
    start_engine: Callable[..., Any], fairkv: dict[str, Any], at_least: int, at_most: int
) -> None:
    engine = start_engine(MODEL, fairkv=fairkv, max_total_tokens=32768)
    right = recalled(engine)
    engine.close()
    assert at_least <= right <= at_most, f"{right} of {len(PROMPTS)} right"

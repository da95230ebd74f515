# SPDX-License-Identifier: Apache-2.0
"""Scorers that see something else than the last queries keep the same tokens at every TP size: keys
alone; and all queries, values, and keys before their rotation.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind everything else: kernels/ must not be found first

from demo.prompts import is_exact, make_prompts  # noqa: E402

MODEL = ROOT / "demo" / "model"
PROMPTS = make_prompts(seed=43_000, count=8, tokens=700, facts=4)
SCORERS: dict[str, dict[str, Any]] = {
    "keydiff": {"scope": "layer"},
    "compactor": {"scope": "threshold", "threshold": -0.2},
}


@pytest.mark.sweep  # kept sets are compared with formulae and kvpress, TP sizes in test_placement
@pytest.mark.parametrize("scorer", SCORERS)
def test_two_ranks_answer_as_one(start_engine: Callable[..., Any], scorer: str) -> None:
    """In chunks, and again with the prompts in the prefix cache, from which only ``keydiff`` takes
    anything.
    """
    found = []
    for tp_size in (1, 2):
        engine = start_engine(
            MODEL,
            fairkv={"ratio": 0.5, "scorer": scorer, **SCORERS[scorer]},
            tp_size=tp_size,
            max_total_tokens=16384,
            chunked_prefill_size=256,
        )
        prompts = [prompt.token_ids for prompt in PROMPTS]
        answers = engine.generate(prompts, new_tokens=6)
        assert engine.generate(prompts, new_tokens=6) == answers
        cached = [int(number) for number in re.findall(r"#cached-token: (\d+)", engine.log)]
        assert cached and any(cached) == (scorer == "keydiff")
        found.append((answers, engine.fairkv()["kept"]))
        engine.close()
    assert found[0] == found[1]
    right = sum(is_exact(p, a) for p, a in zip(PROMPTS, found[0][0], strict=True))
    assert right >= 6, f"{right} of {len(PROMPTS)} right"

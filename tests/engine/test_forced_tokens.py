# SPDX-License-Identifier: Apache-2.0
"""A question forced after its context is answered like one that ends the prompt."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind everything else: kernels/ must not be found first

from demo.prompts import QUESTION_TOKENS, make_prompts  # noqa: E402
from fairkv_sglang.evaluation.client import FORCED, PROCESSOR  # noqa: E402

MODEL = ROOT / "demo" / "model"
ANSWER = 6


def test_forced_questions_get_the_answers_of_a_full_prompt(
    start_engine: Callable[..., Any],
) -> None:
    """With everything kept; several chunks a prompt, overlap scheduling, lengths mixed."""
    engine = start_engine(
        MODEL,
        fairkv={"ratio": 1.0},
        max_total_tokens=32768,
        chunked_prefill_size=256,
        enable_custom_logit_processor=True,
    )
    prompts = [
        prompt.token_ids
        for tokens in (200, 400, 700)
        for prompt in make_prompts(seed=52_000, count=4, tokens=tokens, facts=4)
    ]
    expected = engine.generate(prompts, ANSWER)
    lengths = [QUESTION_TOKENS if i % 3 else QUESTION_TOKENS + 5 for i in range(len(prompts))]
    lengths[0] = 0  # a request without forced tokens in the same batch
    questions = [ids[len(ids) - n :] for ids, n in zip(prompts, lengths, strict=True)]
    results = engine.call(
        "generate",
        input_ids=[ids[: len(ids) - n] for ids, n in zip(prompts, lengths, strict=True)],
        sampling_params=[
            {
                "temperature": 0,
                "ignore_eos": True,
                "max_new_tokens": n + ANSWER,
                "custom_params": {FORCED: question},
            }
            for n, question in zip(lengths, questions, strict=True)
        ],
        custom_logit_processor=[PROCESSOR] * len(prompts),
    )
    found = [result["output_ids"] for result in results]
    assert found == [q + answer for q, answer in zip(questions, expected, strict=True)]

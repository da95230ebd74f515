# SPDX-License-Identifier: Apache-2.0
"""Models that ``make demo`` can serve, and the questions that each of them is asked."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demo.prompts import make_prompts
from demo.smollm2 import checkpoint
from fairkv_sglang.evaluation.client import Prompts
from fairkv_sglang.evaluation.tasks import Check, Sample, facts_task

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Question:
    """A prompt that ends with a question.

    Attributes:
        input_ids: The prompt.
        short: Its end, for people.
        expected: The answer.
        new_tokens: Most tokens of an answer.
        check: Whether an answer is right.
    """

    input_ids: list[int]
    short: str
    expected: str
    new_tokens: int
    check: Check


@dataclass(frozen=True)
class DemoModel:
    """A model and what the demo does with it by default.

    Attributes:
        folder: Makes its checkpoint, if need be, and says where it is.
        profile: Its head profile.
        questions: ``questions(folder, seed, count, tokens, facts)``.
        tp, prompts, rounds, facts, scorer, ratio: Defaults of the flags.
    """

    folder: Callable[[], Path]
    profile: Path
    questions: Callable[[Path, int, int, int, int], list[Question]]
    tp: int
    prompts: int
    rounds: int
    facts: int
    scorer: str = "snapkv"
    ratio: float = 0.25


def _codes(folder: Path, seed: int, count: int, tokens: int, facts: int) -> list[Question]:
    """Codes of names in the small model's words."""
    return [
        Question(
            prompt.token_ids,
            "… " + " ".join(prompt.text.split()[-5:]),
            prompt.answer_text,
            len(prompt.answer_ids) + 4,
            Check("exact", prompt.answer_text),
        )
        for prompt in make_prompts(seed=seed, count=count, tokens=tokens, facts=facts)
    ]


def _numbers(folder: Path, seed: int, count: int, tokens: int, facts: int) -> list[Question]:
    """Numbers of names in plain English, as a chat."""
    prompts = Prompts(load_tokenizer(folder))
    made = []
    for number in range(count):
        rng = random.Random(f"demo {seed} {tokens} {facts} {number}")
        draw = facts_task(facts, 1)(rng, tokens, prompts.count)
        question, checks = draw.questions[0]
        sample = Sample("", "", tokens, draw.context, question, checks)
        context, rest = prompts.split(sample)
        short = "… " + " ".join(question.split(". ")[0].split()[-4:])
        expected = checks[0].value
        made.append(Question(context + rest, short, expected, draw.new_tokens, checks[0]))
    return made


def load_tokenizer(folder: Path) -> object:
    """The tokenizer of a checkpoint."""

    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _smollm2() -> Path:
    try:
        return checkpoint(say=lambda text: print(text, file=sys.stderr))
    except (RuntimeError, OSError) as error:
        raise SystemExit(f"demo: error: {error}") from None


MODELS = {
    "small": DemoModel(
        lambda: HERE / "model", HERE / "profile.json", _codes, tp=2, prompts=16, rounds=5, facts=8
    ),
    "smollm2": DemoModel(
        _smollm2,
        HERE / "smollm2_profile.json",
        _numbers,
        tp=3,
        prompts=8,
        rounds=2,
        facts=1,
        scorer="keydiff",  # SnapKV, kvpress's too, loses most needles here: docs/accuracy.md
        ratio=0.5,
    ),
}

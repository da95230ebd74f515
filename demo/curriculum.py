# SPDX-License-Identifier: Apache-2.0
"""What the demo model is trained on, stage by stage.

Two kinds of rows are mixed.  *Repeats* (a random sequence written twice) give a loss on half of
their tokens and make the copying heads appear early.  *Recall* rows are notes followed by many
questions with their answers, so that one row gives many answers to learn from.

Short rows can be *stretched*: position ids jump ahead at some sentence boundaries, so that a
question and its fact are as far apart, for the rotary positions, as in a long prompt, at the
price of a short one.  Only the last stages pay for really long rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from demo.prompts import (
    CODE_LENGTHS,
    FACT_TOKENS,
    FIRST_TRAINING_SEED,
    HEADER_TOKENS,
    NUMBER_IDS,
    QUESTION_TOKENS,
    draw_facts,
    make_notes,
)
from demo.vocabulary import EOS_ID, PAD_ID, SPECIALS, TOKENS

#: Label of a token without a loss.
NO_LOSS = -100
#: A question with its "</s>", without the code.
EXCHANGE_TOKENS = QUESTION_TOKENS + 1


@dataclass(frozen=True)
class Stage:
    """A part of the training with its own row length and mixture."""

    name: str
    length: int
    rows: int
    steps: int
    lr_first: float
    lr_last: float
    #: Most facts of a row; each row draws from 1 to this many, limited by what fits.
    facts: int
    #: Most questions of a row, none asked twice.
    questions: int
    #: Share of rows that are repeats.
    repeats: float = 0.0
    #: Position ids are stretched up to this many; 0 keeps them contiguous.
    span: int = 0
    #: Share of recall rows whose codes are made of only a few numbers, so that the number before
    #: does not tell what comes next: it takes the name and the place in the code.
    alike: float = 0.0
    #: Possible numbers of tokens in a code.
    code_lengths: tuple[int, ...] = (5,)
    #: Price of attention to far keys, see ``RecallModel.forward``.
    far_price: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Training rows; all tensors are [rows, length]."""

    ids: Tensor
    #: The token to be predicted at each place, or ``NO_LOSS``.
    labels: Tensor
    positions: Tensor
    #: True where the label belongs to the answer of a recall row.
    is_answer: Tensor


def _stretch(rng: random.Random, length: int, cuts: list[int], span: int) -> list[int]:
    """Ascending position ids for a row, with jumps at up to four of ``cuts``."""
    positions = list(range(length))
    if span <= length or not cuts:
        return positions
    total = int(rng.random() * (span - length + 1))
    chosen = sorted(cuts[int(rng.random() * len(cuts))] for _ in range(4))
    shares = sorted(int(rng.random() * (total + 1)) for _ in chosen)
    for cut, share, before in zip(chosen, shares, [0, *shares], strict=False):
        for index in range(cut, length):
            positions[index] += share - before
    return positions


def _repeat_row(rng: random.Random, length: int) -> tuple[list[int], list[int], list[int]]:
    """A random sequence over and over: ids, labels and possible cuts."""
    period = length // 8 + int(rng.random() * (length // 4 + 1))
    first = len(SPECIALS)
    once = [first + int(rng.random() * (len(TOKENS) - first)) for _ in range(period)]
    row = (once * (length // period + 1))[: length + 1]
    labels = [NO_LOSS] * period + row[period + 1 :]
    return row[:length], labels[:length], [period]


def _recall_row(rng: random.Random, stage: Stage) -> tuple[list[int], list[int], list[int]]:
    """Notes with several questions and answers: ids, labels and possible cuts."""
    per_fact = FACT_TOKENS + EXCHANGE_TOKENS + 2 * max(stage.code_lengths)
    most = min(stage.facts, (stage.length - HEADER_TOKENS) // per_fact)
    count = most - int(rng.random() ** 2 * most)
    numbers: Sequence[int] = NUMBER_IDS
    if stage.alike and rng.random() < stage.alike:
        numbers = sorted(NUMBER_IDS, key=lambda _: rng.random())[: 4 + int(rng.random() * 9)]
    facts = draw_facts(rng, count, numbers, stage.code_lengths)
    # Every question must fit, whichever facts it is about, so room is left for the longest.
    asked = min(count, stage.questions)
    longest = sorted((len(fact.code) for fact in facts), reverse=True)[:asked]
    notes = make_notes(rng, stage.length - asked * EXCHANGE_TOKENS - sum(longest), facts)
    ids = list(notes.token_ids)
    labels = [NO_LOSS] * len(ids)
    for fact in notes.facts[:asked]:
        answer = [*fact.code, EOS_ID]
        ids += fact.question() + answer
        labels += [NO_LOSS] * (QUESTION_TOKENS - 1) + answer + [NO_LOSS]
    missing = stage.length - len(ids)
    ids += [PAD_ID] * missing
    labels += [NO_LOSS] * missing
    return ids, labels, [*notes.sentence_starts[1:], len(notes.token_ids)]


def make_batch(stage: Stage, seed: int, step: int) -> Batch:
    """The rows of one training step; equal arguments give equal rows."""
    rng = random.Random(f"train {FIRST_TRAINING_SEED + seed} {stage.name} {step}")
    columns: list[list[list[int]]] = [[], [], [], []]
    for _ in range(stage.rows):
        is_repeat = rng.random() < stage.repeats
        row = _repeat_row(rng, stage.length) if is_repeat else _recall_row(rng, stage)
        ids, labels, cuts = row
        stretched = _stretch(rng, stage.length, cuts, stage.span)
        is_answer = [int(label != NO_LOSS and not is_repeat) for label in labels]
        for column, values in zip(columns, (ids, labels, stretched, is_answer), strict=True):
            column.append(values)
    ids_, labels_, positions, answers = (torch.tensor(column) for column in columns)
    return Batch(ids_, labels_, positions, answers.bool())


STAGES: tuple[Stage, ...] = (
    # Copying appears after about 400 steps, within a minute.
    Stage("copy", 64, 16, 600, 2e-3, 2e-3, facts=2, questions=2, repeats=0.5),
    # Facts have to be told apart by their names.
    Stage("match", 128, 16, 250, 2e-3, 2e-3, facts=5, questions=5, repeats=0.1),
    # The distances of long prompts, in short rows.
    Stage("stretch", 256, 8, 350, 2e-3, 1.02e-3, facts=10, questions=10, repeats=0.05, span=2200),
    # Until here the number before was used to find the next one, which fails when codes share
    # numbers.
    Stage("alike", 128, 16, 600, 1.6e-3, 1.6e-3, 5, 5, repeats=0.05, span=2200, alike=0.8),
    # As many facts and as much filler as in real prompts.
    Stage("long", 1024, 2, 250, 1e-3, 5e-4, facts=24, questions=20, span=2200, alike=0.4),
    # Until here most heads look everywhere; in large models only a few do.
    Stage("few heads", 256, 8, 250, 1.2e-3, 7.714e-4, 10, 10, 0.0, 2200, 0.4, CODE_LENGTHS, 0.05),
    Stage("fewer heads", 256, 8, 120, 1e-3, 8e-4, 10, 10, 0.0, 2200, 0.4, CODE_LENGTHS, 1.0),
    # Full length, with the learning rate going to zero.
    Stage("full", 2048, 1, 50, 5e-4, 2e-5, 40, 24, 0.0, 2600, 0.3, CODE_LENGTHS),
)

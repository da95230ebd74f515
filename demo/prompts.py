# SPDX-License-Identifier: Apache-2.0
"""Recall prompts: a haystack of plain sentences, several facts, one question at the very end.

    notes : the old river followed the bridge . ... the code of anna is 47 12 90 33 . ...
    question : the code of anna is

The answer is the numbers, after which the model ends with ``</s>``.  One fact makes a
pass-key prompt, several make a key-value prompt.  Everything here is pure and deterministic.

Seeds 0 to ``FIRST_TRAINING_SEED - 1`` are reserved for fresh prompts (evaluation, tests, demo,
benchmarks); training only draws from ``FIRST_TRAINING_SEED`` upwards.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from demo.vocabulary import (
    ADJECTIVES,
    ADVERBS,
    EOS_ID,
    ID_OF,
    NAMES,
    NOUNS,
    NUMBERS,
    PREPOSITIONS,
    TOKENS,
    VERBS,
)

FIRST_TRAINING_SEED = 1_000_000
#: Numbers in a code, unless told otherwise; the model has learned all of ``CODE_LENGTHS``.
CODE_LENGTH = 4
CODE_LENGTHS = (3, 4, 5)

_POOLS: dict[str, tuple[int, ...]] = {
    "ADJ": tuple(ID_OF[word] for word in ADJECTIVES),
    "ADV": tuple(ID_OF[word] for word in ADVERBS),
    "NOUN": tuple(ID_OF[word] for word in NOUNS),
    "PREP": tuple(ID_OF[word] for word in PREPOSITIONS),
    "VERB": tuple(ID_OF[word] for word in VERBS),
}
_SENTENCES: tuple[tuple[str, ...], ...] = tuple(
    tuple(line.split())
    for line in (
        "the ADJ NOUN VERB the NOUN .",
        "the NOUN VERB a ADJ NOUN PREP the NOUN .",
        "ADV the ADJ NOUN VERB the ADJ NOUN .",
        "a NOUN VERB the NOUN and then VERB a NOUN .",
        "PREP the NOUN a ADJ NOUN ADV VERB the NOUN .",
        "ADV , the NOUN and the ADJ NOUN VERB a NOUN .",
    )
)
_NAME_IDS = tuple(ID_OF[name] for name in NAMES)
#: Ids of the numbers that codes are made of.
NUMBER_IDS = tuple(ID_OF[number] for number in NUMBERS)
_HEADER = tuple(ID_OF[word] for word in ("notes", ":"))
_FACT = tuple(ID_OF[word] for word in ("the", "code", "of"))
_IS = ID_OF["is"]
_STOP = ID_OF["."]
_QUESTION = (ID_OF["question"], ID_OF[":"], *_FACT)

HEADER_TOKENS = len(_HEADER)
#: Tokens of a fact besides its code: "the code of NAME is" and ".".
FACT_TOKENS = len(_FACT) + 3
#: Tokens of one question, "question : the code of NAME is", without its answer.
QUESTION_TOKENS = len(_QUESTION) + 2


@dataclass(frozen=True)
class Fact:
    """One key and its value, as token ids."""

    name: int
    code: tuple[int, ...]

    def statement(self) -> list[int]:
        """The fact as a sentence, ``FACT_TOKENS`` ids and the code."""
        return [*_FACT, self.name, _IS, *self.code, _STOP]

    def question(self) -> list[int]:
        """The question for it, ``QUESTION_TOKENS`` ids; the next token is the code's first."""
        return [*_QUESTION, self.name, _IS]


@dataclass(frozen=True)
class Notes:
    """A haystack with facts in it, without a question."""

    token_ids: list[int]
    #: Index at which each sentence begins, ascending.
    sentence_starts: list[int]
    #: In a random order, not in the order of the text.
    facts: list[Fact]


@dataclass(frozen=True)
class RecallPrompt:
    """A prompt that ends with a question, and what the model has to say next."""

    text: str
    token_ids: list[int]
    answer_text: str
    #: The code, without the ``</s>`` that has to follow it.
    answer_ids: list[int]


def to_text(ids: Sequence[int]) -> str:
    """Text of token ids; the tokenizer gives exactly these ids back for it."""
    return " ".join(TOKENS[index] for index in ids)


def _pick(rng: random.Random, pool: Sequence[int]) -> int:
    # Only random.random() is promised to be the same in every Python version.
    return pool[int(rng.random() * len(pool))]


def _sample(rng: random.Random, pool: Sequence[int], count: int) -> list[int]:
    """``count`` different entries of ``pool`` in random order."""
    return sorted(pool, key=lambda _: rng.random())[:count]


def _sentence(rng: random.Random) -> list[int]:
    """One filler sentence of 7 to 11 ids."""
    form = _SENTENCES[int(rng.random() * len(_SENTENCES))]
    return [_pick(rng, _POOLS[word]) if word in _POOLS else ID_OF[word] for word in form]


def _filler(rng: random.Random, tokens: int) -> list[list[int]]:
    """Filler sentences of exactly ``tokens`` ids together; the last one may be cut short."""
    sentences: list[list[int]] = []
    missing = tokens
    while missing > 0:
        sentence = _sentence(rng)
        if len(sentence) > missing:
            sentence = [*sentence[: missing - 1], _STOP]
        sentences.append(sentence)
        missing -= len(sentence)
    return sentences


def draw_facts(
    rng: random.Random,
    count: int,
    numbers: Sequence[int] = NUMBER_IDS,
    code_lengths: Sequence[int] = (CODE_LENGTH,),
) -> list[Fact]:
    """``count`` facts with different names and codes made of ``numbers`` (token ids).

    Each code's length is drawn from ``code_lengths``.  Raises ValueError for too many facts.
    """
    if not 1 <= count <= len(NAMES):
        raise ValueError(f"{count} facts need as many of the {len(NAMES)} names")
    facts = []
    for name in _sample(rng, _NAME_IDS, count):
        # A single length takes no random number: the first stages of training had only one.
        length = _pick(rng, code_lengths) if len(code_lengths) > 1 else code_lengths[0]
        facts.append(Fact(name, tuple(_pick(rng, numbers) for _ in range(length))))
    return facts


def make_notes(rng: random.Random, tokens: int, facts: Sequence[Fact]) -> Notes:
    """A haystack of exactly ``tokens`` ids with the facts at random sentence boundaries.

    Raises ValueError when the facts do not fit.
    """
    room = tokens - HEADER_TOKENS - sum(len(fact.statement()) for fact in facts)
    if room < 0:
        raise ValueError(f"{len(facts)} facts do not fit into {tokens} tokens")
    sentences = _filler(rng, room)
    # Slots are counted before anything is inserted, so that facts may also stand side by side.
    slots = sorted(int(rng.random() * (len(sentences) + 1)) for _ in facts)
    for fact, slot in zip(reversed(facts), reversed(slots), strict=True):
        sentences.insert(slot, fact.statement())
    ids, starts = list(_HEADER), []
    for sentence in sentences:
        starts.append(len(ids))
        ids.extend(sentence)
    return Notes(ids, starts, _shuffled(rng, facts))


def _shuffled(rng: random.Random, facts: Sequence[Fact]) -> list[Fact]:
    return sorted(facts, key=lambda _: rng.random())


def make_prompts(
    seed: int, count: int, tokens: int, facts: int, code_length: int = CODE_LENGTH
) -> list[RecallPrompt]:
    """``count`` fresh prompts of exactly ``tokens`` tokens holding ``facts`` facts each.

    ``code_length`` is the number of tokens of each answer, one of ``CODE_LENGTHS``.  ``seed``
    must lie below ``FIRST_TRAINING_SEED``; two different seeds give different prompts.
    """
    if not 0 <= seed < FIRST_TRAINING_SEED:
        raise ValueError(f"seeds from {FIRST_TRAINING_SEED} on belong to training, got {seed}")
    rng = random.Random(f"fresh {seed} {tokens} {facts} {code_length}")
    prompts = []
    for _ in range(count):
        drawn = draw_facts(rng, facts, code_lengths=(code_length,))
        notes = make_notes(rng, tokens - QUESTION_TOKENS, drawn)
        asked = notes.facts[0]
        ids = notes.token_ids + asked.question()
        answer = list(asked.code)
        prompts.append(RecallPrompt(to_text(ids), ids, to_text(answer), answer))
    return prompts


def is_exact(prompt: RecallPrompt, generated: Sequence[int]) -> bool:
    """Whether ``generated`` ids begin with the whole code and then end."""
    expected = [*prompt.answer_ids, EOS_ID]
    return list(generated[: len(expected)]) == expected

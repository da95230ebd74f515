# SPDX-License-Identifier: Apache-2.0
"""What a model is told when it repeats a prompt, and which prompts are remembered."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from fairkv_sglang.budgets.repeats import FIRST, LATER, TAIL, Wording, wording_of
from fairkv_sglang.memory import contexts as contexts_of_a_rank
from fairkv_sglang.memory.contexts import Contexts

WORDING = Wording(first=(1,), later=(2, 3), suffix=(4,), prefix=(7, 8))


class Tokenizer:
    """A token is a character."""

    def __init__(self, template: str | None = None) -> None:
        self.chat_template = template

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options["add_generation_prompt"] and not options["tokenize"]
        return str(self.chat_template).format(messages[0]["content"])


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def test_words_without_and_with_a_chat_template() -> None:
    assert wording_of(Tokenizer()) == Wording(ids(FIRST), ids(LATER), ids("\n"))
    found = wording_of(Tokenizer("<s>a context for you<u>{}</u><a>"))
    assert found == Wording(ids(FIRST), ids(LATER), ids("</u><a>"), ids("<s>a context for you<u>"))
    assert found.longest == len(LATER) + TAIL + len("</u><a>")
    assert wording_of(Tokenizer("no place for a message")).prefix == ()


@pytest.mark.parametrize(
    ("length", "chunks"),
    [
        (1, [(0, 1)]),
        (10, [(0, 10)]),
        (11, [(0, 10), (10, 11)]),
        (30, [(0, 10), (10, 20), (20, 30)]),
    ],
)
def test_chunks(length: int, chunks: list[tuple[int, int]]) -> None:
    assert WORDING.chunks([0] * length, 10) == chunks
    behind = [(start + 2, end + 2) for start, end in chunks]
    assert WORDING.chunks([7, 8] + [0] * length, 10) == behind


def test_a_prompt_that_is_no_more_than_the_templates_beginning_is_repeated() -> None:
    assert WORDING.chunks([7, 8], 10) == [(0, 2)]


def test_tokens_of_passes() -> None:
    """A later chunk is announced by the end of the one before, which may be shorter than a tail."""
    prompt = array("q", range(100, 130))
    contexts = Contexts()
    context = contexts.get(prompt, "", WORDING, 12)
    assert context.chunks == [(0, 12), (12, 24), (24, 30)]
    passes = []
    while not context.complete:
        passes.append(context.next(WORDING).tokens.tolist())
        contexts.launched(context.next(WORDING))
    assert passes == [
        [1, 4, *range(100, 112)],
        [2, 3, *range(104, 112), 4, *range(112, 124)],
        [2, 3, *range(116, 124), 4, *range(124, 130)],
    ]
    assert (contexts.passes, contexts.tokens) == (3, sum(map(len, passes)))
    short = contexts.get(array("q", range(5)), "", WORDING, 3)
    short.done = 1
    assert short.next(WORDING).tokens.tolist() == [2, 3, 0, 1, 2, 4, 3, 4]


def test_a_prompt_is_repeated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts_of_a_rank, "MOST_TOKENS", 25)
    contexts = Contexts()

    def get(first: int, namespace: str = "") -> object:
        return contexts.get(array("q", range(first, first + 10)), namespace, WORDING, 99)

    one, two = get(1), get(2)
    assert get(1) is one and get(1, "another") is not one  # two is forgotten
    assert get(2) is not two and get(2, "") is get(2)
    contexts.clear()
    assert get(2) is get(2)
    assert contexts.reused == 0  # none of them was complete
    last: Any = get(2)
    last.done = 1
    assert get(2) is last and contexts.reused == 1

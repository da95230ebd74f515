# SPDX-License-Identifier: Apache-2.0
"""Plain English made from a seed: what facts are hidden in."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Anna Bruno Carla David Elena Felix Greta Hugo Irene Jonas Karin Lukas Maria Nadia Oscar Paula "
    "Quentin Rosa Simon Tanja Ulrich Vera Walter Xenia Yusuf Zelda Adrian Bella Cyril Dora"
)
THINGS = _words(
    "river bridge garden window market teacher sailor farmer baker painter doctor driver village "
    "harbour mountain valley forest meadow island castle tower station street kitchen table lamp "
    "mirror carpet blanket basket bottle hammer ladder wagon bicycle boat train horse rabbit "
    "sparrow puppy apple cherry lemon onion letter picture poem journey winter summer thunder"
)
QUALITIES = _words(
    "old quiet small green red blue bright heavy narrow wide soft warm cold round plain early "
    "empty open hidden distant famous young clever calm golden wooden dusty rainy lonely patient"
)
_DEEDS = _words(
    "watched followed carried painted moved crossed found passed noticed visited repaired opened "
    "described remembered returned measured admired greeted lifted warmed reached circled"
)
_FORMS = (
    "The {q} {t} {d} the {t}.",
    "The {t} {d} a {q} {t} near the {t}.",
    "Later the {q} {t} {d} the {q} {t}.",
    "A {t} {d} the {t} and then {d} a {t}.",
    "Behind the {t} a {q} {t} slowly {d} the {t}.",
    "Yesterday the {t} and the {q} {t} {d} a {t}.",
)
Count = Callable[[str], int]
"""Tokens of a text."""


def sentence(rng: random.Random) -> str:
    """One sentence of 6 to 12 words."""
    words = {"{q}": QUALITIES, "{t}": THINGS, "{d}": _DEEDS}
    text = rng.choice(_FORMS)
    for mark, choices in words.items():
        while mark in text:
            text = text.replace(mark, rng.choice(choices), 1)
    return text


def haystack(rng: random.Random, tokens: int, needles: Sequence[str], count: Count) -> str:
    """Sentences of about ``tokens`` tokens with ``needles`` among them, in their order.

    Args:
        rng: Decides the sentences and the places.
        tokens: Length, at most a sentence less.
        needles: Sentences of their own.
        count: Tokens of a text.

    Raises:
        ValueError: The needles do not fit.
    """
    left = tokens - sum(count(" " + needle) for needle in needles)
    if left < 0:
        raise ValueError(f"{len(needles)} facts do not fit into {tokens} tokens")
    lines: list[str] = []
    while True:
        line = sentence(rng)
        left -= count(" " + line)
        if left < 0:
            break
        lines.append(line)
    places = sorted(rng.randint(0, len(lines)) for _ in needles)
    for needle, place in reversed(list(zip(needles, places, strict=True))):
        lines.insert(place, needle)
    return " ".join(lines)

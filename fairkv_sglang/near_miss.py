# SPDX-License-Identifier: Apache-2.0
"""What is wrong gets one line with what was meant: a name, a flag, a package that is missing.

Imports nothing that may be missing itself.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import NoReturn


def did_you_mean(word: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``: did you mean ...?`` if one of the ``known`` words is like this one, else nothing.

    Args:
        word: What was given.
        known: What there is.
        cutoff: Similarity that counts, up to 1; more where all words begin alike.
    """
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=cutoff)
    return f": did you mean {close[0]}?" if close else ""


def missing_package(error: ModuleNotFoundError) -> str:
    """The package that an import has asked for; transformers reports it as a cause."""
    while error.name is None:
        cause = error.__cause__ or error.__context__
        if not isinstance(cause, ModuleNotFoundError):
            return " ".join(str(error).split())
        error = cause
    return f"{error.name} is not installed: pip install it"


def unknown_flags(words: Iterable[str], known: Iterable[str]) -> str:
    """One line about the first of the ``words`` that no parser took.

    Args:
        words: What was left over of a command line.
        known: Flags that there are.
    """
    word = next(iter(words)).partition("=")[0]
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    return f"there is no flag {word}{did_you_mean(word.replace('_', '-'), known, cutoff=0.75)}"


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """All flags of a parser."""
    return [flag for action in parser._actions for flag in action.option_strings]


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line; what is unknown is left to the caller (``parse_known_args``)."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def guard(parser: argparse.ArgumentParser, prefix: str) -> None:
    """Unknown flags of ``parser`` that begin with ``prefix`` end in one line, status 2.

    For SGLang's parser, whose other errors stay as they are.
    """
    parse = parser.parse_known_args

    def parse_known_args(
        args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, rest = parse(args, namespace)
        ours = [word for word in rest if word.startswith(prefix)]
        if ours:
            parser.exit(2, f"error: {unknown_flags(ours, flags_of(parser))}\n")
        return found, rest

    parser.parse_known_args = parse_known_args  # type: ignore[assignment]

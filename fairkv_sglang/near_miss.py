# SPDX-License-Identifier: Apache-2.0
"""A mistyped flag gets one line with the flag that was meant, not the usage of all of them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import NoReturn


def unknown_flags(words: Iterable[str], known: Iterable[str]) -> str:
    """One line about the first of the ``words`` that no parser took.

    Args:
        words: What was left over of a command line.
        known: Flags that there are.
    """
    word = next(iter(words)).partition("=")[0]
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    close = difflib.get_close_matches(word.replace("_", "-"), list(known), n=1, cutoff=0.75)
    return f"there is no flag {word}" + (f": did you mean {close[0]}?" if close else "")


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

# SPDX-License-Identifier: Apache-2.0
"""Prompts of a benchmark: random token ids, the same on every machine for the same seed."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Model = TypeVar("Model", bound=BaseModel)

FIRST_ID = 3
"""Ids below are special tokens of the models that the benchmark builds."""


class Workload(BaseModel):
    """What every variant is asked to do.

    Attributes:
        prompts: Number of requests.
        prompt_lengths: Tokens of a prompt; requests take them in turn.
        output_length: New tokens of each request; the end of sequence is ignored.
        seed: Of the token ids and arrivals.
        shared_prefix: First tokens that all prompts of a round have in common, as questions about
            one document have: computed once (prefix cache), read in decode for each.
        request_rate: Requests per second of a Poisson process; None: all at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: int = Field(gt=0)
    prompt_lengths: tuple[int, ...] = Field(min_length=1)
    output_length: int = Field(gt=1)
    seed: int = 0
    shared_prefix: int = Field(default=0, ge=0)
    request_rate: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _prompts_differ(self) -> Self:
        if self.shared_prefix >= min(self.prompt_lengths):
            raise ValueError(
                f"a shared prefix of {self.shared_prefix} tokens leaves nothing of a prompt of "
                f"{min(self.prompt_lengths)}; give a shorter one"
            )
        return self

    def lengths(self) -> list[int]:
        """Prompt length of each request."""
        kinds = len(self.prompt_lengths)
        return [self.prompt_lengths[i % kinds] for i in range(self.prompts)]

    @property
    def longest(self) -> int:
        """Longest prompt plus output, in tokens."""
        return max(self.prompt_lengths) + self.output_length

    @property
    def mean_prompt(self) -> float:
        """Mean prompt length in tokens."""
        return float(np.mean(self.lengths()))

    def make(self, vocab: int, round_index: int = 0) -> list[list[int]]:
        """Prompts of a round; no two share more than ``shared_prefix``, and rounds nothing.

        Raises:
            ValueError: for a vocabulary without ordinary ids.
        """
        if vocab <= FIRST_ID + 1:
            raise ValueError(f"a vocabulary of {vocab} has no ids for random prompts")
        generator = np.random.default_rng([self.seed, round_index])
        shared = generator.integers(FIRST_ID, vocab, size=self.shared_prefix).tolist()
        return [
            shared + generator.integers(FIRST_ID, vocab, size=length - len(shared)).tolist()
            for length in self.lengths()
        ]

    def arrivals(self, round_index: int = 0) -> list[float]:
        """Seconds after the start of a round at which each request is sent, ascending."""
        if self.request_rate is None:
            return [0.0] * self.prompts
        generator = np.random.default_rng([self.seed, round_index, 1])
        gaps = generator.exponential(1 / self.request_rate, size=self.prompts)
        times: list[float] = (np.cumsum(gaps) - gaps[0]).tolist()
        return times


def portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for a result file; of paths the last three parts, no more goes out."""
    changed = dict(settings)
    for key in ("profile", "model_path"):
        if changed.get(key):
            changed[key] = "/".join(Path(changed[key]).parts[-3:])
    return changed


def from_flags(kind: type[Model], flags: Namespace, /, **parsed: Any) -> Model:
    """A ``kind`` from the flags of its fields' names, and from what was made of other flags.

    Raises:
        ValueError: in one line, naming the flag.
    """
    same = {name: value for name, value in vars(flags).items() if name in kind.model_fields}
    try:
        return kind(**(same | parsed))
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # about more than one flag
            raise ValueError(first["msg"].removeprefix("Value error, ")) from None
        name = "--" + str(first["loc"][-1]).replace("_", "-")
        raise ValueError(f"{name}: {first['msg']}, got {first['input']!r}") from None


def parse_ints(text: str, name: str) -> tuple[int, ...]:
    """Positive whole numbers from ``"128,256"``.

    Raises:
        ValueError: in one line, naming the flag.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        values = tuple(int(part) for part in parts)
    except ValueError:
        raise ValueError(
            f"{name} {text!r}: give whole numbers with commas between, e.g. 128,256"
        ) from None
    if min(values) < 1:
        raise ValueError(f"{name} {text!r}: numbers must be at least 1")
    return values


def parse_names(text: str, known: Sequence[str], name: str) -> tuple[str, ...]:
    """Names from ``"a,b"`` or ``"all"``, in the order given, each once.

    Raises:
        ValueError: in one line, listing the known ones.
    """
    if text == "all":
        return tuple(known)
    chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for part in chosen:
        if part not in known:
            raise ValueError(f"{name}: {part!r} is not one of {', '.join(known)} (or all)")
    return chosen

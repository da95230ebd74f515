# SPDX-License-Identifier: Apache-2.0
"""Passes in which a model repeats a prompt, chunk by chunk: what is said before each chunk.

A pass is the whole prompt, an instruction to repeat it, and one chunk of it again. The words and
their order are those of KVzip (arXiv 2505.23416) as kvpress's press has them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
TAIL = 8
"""Tokens of the chunk before that tell a later chunk's beginning."""
_CONTENT = "context"


@dataclass(frozen=True)
class Wording:
    """Tokens around a chunk.

    Attributes:
        first: The instruction before the first chunk.
        later: The instruction before another, followed by the tail of the chunk before.
        suffix: How the chat template ends the user's turn and begins the model's.
        prefix: How it begins the user's turn; a prompt that starts with it is repeated without it.
    """

    first: tuple[int, ...]
    later: tuple[int, ...]
    suffix: tuple[int, ...]
    prefix: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        """Most tokens of a pass between the prompt and the chunk."""
        return max(len(self.first), len(self.later) + TAIL) + len(self.suffix)

    def chunks(self, prompt: Sequence[int], size: int) -> list[tuple[int, int]]:
        """``[start, end)`` of the chunks of a prompt, each with ``size`` tokens but the last."""
        skipped = len(self.prefix)
        if skipped >= len(prompt) or tuple(prompt[:skipped]) != self.prefix:
            skipped = 0
        ends = [*range(skipped + size, len(prompt), size), len(prompt)]
        return list(zip([skipped, *ends], ends, strict=False))

    def repeated(self, prompt: array[int], start: int, end: int, before: int) -> array[int]:
        """Tokens of a pass behind the prompt: instruction and chunk.

        Args:
            prompt: Its tokens.
            start, end: The chunk.
            before: Start of the chunk before; ``start`` if this is the first.
        """
        said = [*self.first] if before == start else [*self.later]
        tail = prompt[max(start - TAIL, before) : start]
        return array("q", said) + tail + array("q", self.suffix) + prompt[start:end]


@dataclass(frozen=True)
class PassPart:
    """What is computed at once of a pass that repeats a chunk.

    Attributes:
        q: ``[T, n, g, D]`` queries of the next tokens behind the prompt, rotary embedding applied.
        k: ``[sinks + chunk + own, n, D]`` keys of the prompt's first tokens, of the chunk, and of
            all tokens behind the prompt up to here; any float dtype.
        sinks: First tokens of the prompt among them.
        chunk: Tokens of the chunk.
        scale: Factor of the attention logits.
        ends: Whether these are the last tokens of the pass.
    """

    q: Tensor
    k: Tensor
    sinks: int
    chunk: int
    scale: float
    ends: bool


@dataclass(frozen=True)
class Attended:
    """A pass so far.

    Attributes:
        done: Tokens behind the prompt whose blocks are taken in.
        pending: ``[r, n, g, D]`` queries from there on.
        most: float32 ``[n, chunk]`` the most attention that each token of the chunk has got.
    """

    done: int
    pending: Tensor
    most: Tensor


def wording_of(tokenizer: Any) -> Wording:
    """The words in a model's tokens, by its own chat template if it has one.

    Args:
        tokenizer: With ``encode``, ``chat_template`` and ``apply_chat_template`` as Hugging Face's.
    """

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    prefix, suffix = "", "\n"
    if getattr(tokenizer, "chat_template", None):
        message = {"role": "user", "content": _CONTENT}
        rendered = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        # The last one: a system prompt of the template may have the word, too.
        prefix, found, after = rendered.rpartition(_CONTENT)
        prefix, suffix = (prefix, after) if found else ("", suffix)
    return Wording(encode(FIRST), encode(LATER), encode(suffix), encode(prefix))

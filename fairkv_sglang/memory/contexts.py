# SPDX-License-Identifier: Apache-2.0
"""Scores of prompts that were repeated for their scorer, and what is still to be repeated.

A context is a prompt by its tokens, whichever request has it: it is repeated once, and several
requests with the same prompt use its scores.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fairkv_sglang.budgets.repeats import Wording

MOST_TOKENS = 1 << 16
"""Tokens of the contexts that are remembered; of a model with 32 layers and 8 KV heads a rank
keeps 64 MiB of scores for them."""


@dataclass(eq=False)
class Context:
    """A prompt that is scored by passes that repeat it; the same on every rank but for ``scores``.

    Attributes:
        tokens: Of the prompt.
        chunks: ``[start, end)`` of each pass.
        done: Passes that are launched; their scores are there for whatever is launched later.
        scores: Layer -> float32 ``[home heads, N]``, 0 for tokens that no pass has scored.
    """

    tokens: array[int]
    chunks: list[tuple[int, int]]
    done: int = 0
    scores: dict[int, Tensor] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """All tokens are scored."""
        return self.done == len(self.chunks)

    def next(self, wording: Wording) -> Repeat:
        """The pass that is due."""
        start, end = self.chunks[self.done]
        before = self.chunks[self.done - 1][0] if self.done else start
        return Repeat(self, start, end, wording.repeated(self.tokens, start, end, before))


@dataclass(eq=False)
class Repeat:
    """A pass that repeats a chunk of a context.

    Attributes:
        context: The context.
        start, end: The chunk.
        tokens: What stands behind the context in this pass.
        seen: Layer -> what the scorer has made of the part of the pass that was computed.
    """

    context: Context
    start: int
    end: int
    tokens: array[int]
    seen: dict[int, Any] = field(default_factory=dict)


class Contexts:
    """The last contexts, up to ``MOST_TOKENS`` tokens and at least one.

    Attributes:
        passes: Passes launched since the start.
        tokens: Tokens that they had behind their prompts.
        reused: Prompts that found their context complete.
    """

    def __init__(self) -> None:
        self.passes = self.tokens = self.reused = 0
        self._known: OrderedDict[Hashable, Context] = OrderedDict()
        self._held = 0

    def get(self, tokens: array[int], namespace: Hashable, wording: Wording, size: int) -> Context:
        """The context of a prompt, a new one if it is not known.

        Args:
            tokens: The prompt.
            namespace: What else the cached prompt depends on.
            wording: Of the passes.
            size: Tokens of a chunk.
        """
        key = namespace, tokens.tobytes()
        context = self._known.pop(key, None)
        if context is None:
            context = Context(tokens, wording.chunks(tokens, size))
            self._held += len(tokens)
        elif context.complete:
            self.reused += 1
        self._known[key] = context
        while self._held > MOST_TOKENS and len(self._known) > 1:
            _, oldest = self._known.popitem(last=False)
            self._held -= len(oldest.tokens)
        return context

    def launched(self, repeat: Repeat) -> None:
        """A pass runs to its end."""
        repeat.context.done += 1
        self.passes += 1
        self.tokens += len(repeat.tokens)

    def clear(self) -> None:
        """The prefix cache is emptied, for instance because the weights have changed."""
        self._known.clear()
        self._held = 0

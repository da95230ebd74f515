# SPDX-License-Identifier: Apache-2.0
"""Bases for scorers in plain torch: one head at a time, so that tensor shapes, and with them the
order of sums, do not depend on the other heads of a call.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fairkv_sglang.budgets.prompt_tensors import PromptTensors
from fairkv_sglang.budgets.scorers.base import Scorer

ALWAYS = 1e30
"""Score of a token that is always kept: above any other of any head, and finite."""


class PerHead(Scorer):
    """A scorer that is told one head at a time."""

    @abstractmethod
    def score_head(self, head: PromptTensors) -> Tensor:
        """float32 ``[N - window]``; only called where N > window.

        Args:
            head: Of one head, without dimension n (:meth:`PromptTensors.head`).
        """

    def score(self, q: Tensor | None, k: Tensor, *, scale: float) -> Tensor:
        """See the base class; for scorers that need no more than that."""
        return self.score_prompt(PromptTensors(q, k, scale))

    def score_prompt(self, prompt: PromptTensors) -> Tensor:
        """See the base class."""
        total, n, _ = prompt.k.shape
        self._check(prompt)
        if total <= self.window:
            return prompt.k.new_empty((n, 0), dtype=torch.float32)
        return torch.stack([self.score_head(prompt.head(i)) for i in range(n)])

    def _check(self, prompt: PromptTensors) -> None:
        total, n, width = prompt.k.shape
        if self.needs_queries:
            q, rows = prompt.q, min(self.window, total)
            if q is None:
                raise ValueError(f"scorer {self.name!r} needs the queries of the last tokens")
            if q.dim() != 4 or q.shape[1] != n or q.shape[3] != width:
                raise ValueError(f"queries {list(q.shape)} do not fit keys {list(prompt.k.shape)}")
            if len(q) < rows:
                raise ValueError(f"scorer {self.name!r} needs {rows} queries, not {len(q)}")
        for needed, given, what in (
            (self.needs_values, prompt.v, "the values of the prompt"),
            (self.needs_rope, prompt.rope, "the model's rotary embedding"),
            (self.observes, prompt.seen, "the queries of all tokens of the prompt"),
        ):
            if needed and given is None:
                raise ValueError(f"scorer {self.name!r} needs {what}")


@dataclass(frozen=True)
class Seen:
    """Queries of a prompt so far.

    Attributes:
        done: Tokens whose blocks are taken in.
        pending: ``[r, n, g, D]`` queries from there on.
        heads: What the blocks have made of each head; None before the first.
    """

    done: int
    pending: Tensor
    heads: list[Any]


class Observer(PerHead):
    """A scorer that takes in the queries of all tokens, block by block.

    Blocks begin at token ``first_query`` and have ``block`` tokens, however the prompt is cut into
    chunks; queries of a block that is not complete are carried over. Only blocks before the window
    are taken in before the prompt has ended, so a scorer may leave the window out.
    """

    observes: ClassVar[bool] = True
    takes_window: ClassVar[bool] = True
    """Whether queries of the window count, too."""

    @property
    @abstractmethod
    def block(self) -> int:
        """Tokens of a block."""

    @property
    def first_query(self) -> int:
        """First token whose query counts."""
        return 0

    @abstractmethod
    def take_in(self, seen: Any, block: PromptTensors, first: int) -> Any:
        """Adds a block to what a head has seen.

        Args:
            seen: What the last block gave; None for the first.
            block: ``q`` ``[tokens, g, D]`` of the block, ``k`` ``[end, D]`` of all tokens up to its
                end, a view among other heads: to be made contiguous before it is reckoned with.
            first: Position of its first token.
        """

    def observe(self, seen: Any, part: PromptTensors) -> Seen:
        """See the base class."""
        assert part.q is not None  # the compressor gives what an observer is for
        if seen is None:
            seen = Seen(0, part.q[:0], [None] * part.k.shape[1])
        q = torch.cat([seen.pending, part.q])
        return self._taken_in(replace(seen, pending=q), part, len(part.k) - self.window, False)

    def score_prompt(self, prompt: PromptTensors) -> Tensor:
        """See the base class; what is pending is taken in first."""
        total = len(prompt.k)
        if prompt.seen is not None and total > self.window:
            end = total if self.takes_window else total - self.window
            prompt = replace(prompt, seen=self._taken_in(prompt.seen, prompt, end, True))
        return super().score_prompt(prompt)

    def _taken_in(self, seen: Seen, part: PromptTensors, end: int, last: bool) -> Seen:
        """Takes in the blocks that end at ``end`` or before, the ``last`` one cut off there."""
        done, q, heads = seen.done, seen.pending, list(seen.heads)
        while done < end:
            skipped = done < self.first_query
            stop = self.first_query if skipped else done + self.block
            if stop > end:
                if not last:
                    break
                stop = end
            if not skipped:
                for i in range(len(heads)):
                    block = PromptTensors(
                        q[: stop - done, i].contiguous(),
                        part.k[:stop, i],
                        part.scale,
                        rope=part.rope,
                    )
                    heads[i] = self.take_in(heads[i], block, done)
            q, done = q[stop - done :], stop
        return Seen(done, q.clone(), heads)

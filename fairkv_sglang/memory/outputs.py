# SPDX-License-Identifier: Apache-2.0
"""Requests that are compressed again while they write: when, and down to how much.

All heads of a request grow by a token a step, so all of them are due in the same step, which every
rank knows from counts alone. What was held at the end of the prompt, or what a budget of tokens
gives where the prompt was shorter than that, is what a head goes back to, for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.budgets import AS_SERVER, BudgetScope, BudgetSpec, Keep
from fairkv_sglang.memory.decisions import DecisionLog
from fairkv_sglang.memory.page_ledger import PageLedger
from fairkv_sglang.memory.residents import Residents
from fairkv_sglang.placement import Router

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class OutputBound:
    """What a request with a prompt of some length may hold while it writes.

    Attributes:
        due: Tokens of output after which it is compressed for the first time.
        slack: The same from then on.
        whole: ``[L, H]`` tokens that its heads go back to where its prompt was kept whole; None
            where each goes back to what it kept of the prompt.
    """

    due: int
    slack: int
    whole: IntArray | None

    def most(self, kept: NDArray[np.number]) -> NDArray[np.number]:
        """``[L, H]`` tokens that heads with ``kept [L, H]`` of the prompt hold at most."""
        if self.whole is None:
            return kept + self.slack
        return np.maximum(kept + self.due, self.whole + self.slack)


class OutputRule:
    """When outputs are compressed, and to what; the same for all ranks.

    Args:
        scope: The server's budget scope.
        slack: Tokens that a request may write before it is compressed again.
    """

    def __init__(self, scope: BudgetScope, slack: int) -> None:
        self.scope, self.slack = scope, slack

    def bound(self, prompt_len: int, keep: Keep = AS_SERVER) -> OutputBound | None:
        """Of a request; None if it keeps everything, and so its output.

        The budget of a prompt is that of its scope, with one exception: the bounds of a server's
        share do not hold for a request with a share of its own, but what it keeps of its output
        is not below the server's tokens.
        """
        own, server = keep.spec, self.scope.spec
        spec = server if own is None else own
        if spec.ratio == 1.0:
            return None
        scope = keep.scope(self.scope, prompt_len)
        if scope.budget(prompt_len) < prompt_len:
            return OutputBound(self.slack, self.slack, None)
        tokens = max(spec.of(prompt_len), scope.least)
        if own is not None and own.ratio is not None:
            tokens = max(tokens, server.tokens or server.least or 0)
        due = self.slack + tokens - prompt_len
        alike = replace(keep, spec=BudgetSpec(tokens=tokens)).scope(self.scope, prompt_len)
        return OutputBound(due, self.slack, alike.expected(tokens + self.slack))


@dataclass(frozen=True)
class Due:
    """A request to be compressed before the next pass.

    Attributes:
        row: Its row.
        length: Its tokens, prompt and output.
        held: ``[L, H]`` tokens that its heads hold.
        counts: ``[L, H]`` tokens that stay.
        first: The first rows of each head that stay in any case.
    """

    row: int
    length: int
    held: IntArray
    counts: IntArray
    first: int


@dataclass
class _Row:
    bound: OutputBound
    length: int
    first: int
    due: int
    held: IntArray | None = None  # [L, H] after the prompt, or the last compression
    written: int = 0  # tokens since then


class Outputs:
    """Rows whose outputs are bounded; decisions are the same on all ranks.

    A row that has written its slack goes back to its budget in the ledger as soon as the pass that
    writes the last of it is launched, and on the device before anything of the next pass: as with
    the pages of a row that is freed, no pass starts in between.

    Args:
        rule: When, and to what.
        ledger, residents, router, log: What counts the tokens of rows.
    """

    def __init__(
        self,
        rule: OutputRule,
        ledger: PageLedger,
        residents: Residents,
        router: Router,
        log: DecisionLog,
    ) -> None:
        self.rule = rule
        self.compressions = 0
        self.freed_pages = np.zeros_like(ledger.capacity)
        """``[R]`` pages that compressions gave back."""
        self.due: list[Due] = []
        """What the device has to do before the next pass."""
        self._ledger, self._residents, self._router, self._log = ledger, residents, router, log
        self._rows: dict[int, _Row] = {}
        self._reached: list[int] = []

    def admit(self, row: int, prompt_len: int, keep: Keep) -> None:
        """A request got its row."""
        bound = self.rule.bound(prompt_len, keep)
        if bound is None:
            return
        first = keep.scope(self.rule.scope, prompt_len).sink
        if keep.spans and keep.spans[0][0] == 0:  # of others the places among kept rows vary
            first = max(first, min(keep.spans[0][1], prompt_len))
        self._rows[row] = _Row(bound, prompt_len, first, bound.due)

    def settle(self, row: int, kept: IntArray) -> None:
        """What it kept of its prompt, ``[L, H]``, is known."""
        if row in self._rows:
            self._rows[row].held = kept

    def grow(self, rows: list[int]) -> None:
        """Each row writes a token in the pass that is put together."""
        for row in rows:
            entry = self._rows.get(row)
            if entry is None:
                continue
            entry.length += 1
            entry.written += 1
            if entry.written >= entry.due and entry.held is not None:
                self._reached.append(row)

    def left(self, row: int) -> int | None:
        """Tokens that the row may write until it is compressed; None if it never is."""
        entry = self._rows.get(row)
        return None if entry is None else max(entry.due - entry.written, 0)

    def growth(self, tokens: int) -> int:
        """At most ``tokens``, and what any of the rows may write until it is compressed."""
        if len(self._rows) < len(self._ledger):  # one of them is not bounded
            return tokens
        return min(tokens, max((entry.due for entry in self._rows.values()), default=tokens))

    def shrink(self) -> None:
        """The pass is about to be launched: rows that reach their slack in it go back to their
        budgets in all books.
        """
        for row in self._reached:
            entry = self._rows[row]
            assert entry.held is not None
            kept, whole = entry.held, entry.bound.whole
            counts = kept if whole is None else whole
            self.due.append(Due(row, entry.length, kept + entry.written, counts, entry.first))
            before = self._ledger.charge(row)
            self._ledger.shrink(row, counts)
            self.freed_pages += before - self._ledger.charge(row)
            self._residents.shrink(row, counts)
            self._router.update(row, counts)
            self._log.add("shrink", row, counts.tobytes())
            self.compressions += 1
            entry.held, entry.written, entry.due = counts, 0, entry.bound.slack
        self._reached.clear()

    def take_due(self) -> list[Due]:
        """What the device has to do now."""
        due, self.due = self.due, []
        return due

    def release(self, row: int) -> None:
        """The row is free; its pages go back as many as the device holds."""
        if self._rows.pop(row, None) is not None:
            self._reached = [other for other in self._reached if other != row]
            self.due = [due for due in self.due if due.row != row]

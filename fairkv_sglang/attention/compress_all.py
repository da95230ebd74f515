# SPDX-License-Identifier: Apache-2.0
"""Compression on a device: no waits, and a few launches a layer for all prompts of the pass.

What depends on the prompts alone is copied to the device once, before the first layer. Then a layer
is scored, counted, picked and stored by kernels that take all prompts at once. Untested on a GPU;
the tests run it with interpreted kernels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairkv_sglang.attention.choose import protect
from fairkv_sglang.attention.compress import LayerInputs, PromptCompressor
from fairkv_sglang.attention.endings import Choice, Ending, LayerRows, StoreBatch
from fairkv_sglang.attention.exchange import HomeExchange
from fairkv_sglang.attention.forward_spans import ForwardSpans
from fairkv_sglang.attention.hand_over import HandOver
from fairkv_sglang.attention.hidden_scores import HiddenScores
from fairkv_sglang.budgets import Kept, Rope, Scorer
from fairkv_sglang.budgets.scopes.pooled import Pooled
from fairkv_sglang.kernels.interface import PromptKernels
from fairkv_sglang.kernels.prompts import PromptBatch, to_device
from fairkv_sglang.memory.rows import RowBook


class AllPromptsCompressor(PromptCompressor):
    """:class:`PromptCompressor` with the operations of :class:`PromptKernels`.

    A pass that ends a prompt with a scorer or scope of its own, or with a scope that spans layers,
    goes the base class's way, prompt by prompt.
    """

    def __init__(
        self,
        book: RowBook,
        scorer: Scorer,
        hand_over: HandOver,
        exchange: HomeExchange | None,
        rope: Rope | None,
        hidden: HiddenScores | None,
        kernels: PromptKernels,
    ) -> None:
        super().__init__(book, scorer, hand_over, exchange, rope, hidden)
        self.kernels = kernels
        # Homes are neighbours, so the home heads of a table of all heads are a view.
        self._mine = slice(self.heads.home[0], self.heads.home[-1] + 1)

    def begin(self, spans: ForwardSpans, req_to_token: Tensor) -> None:
        """See the base class; the tables of all layers go to the device here."""
        super().begin(spans, req_to_token)
        self._alike = all(map(self._as_server, self._endings))
        if not self._endings or not self._alike:
            return
        scope, window = self.scope, self.scope.window
        everything = [e.scope.budget(e.span.prompt_len) >= e.span.prompt_len for e in self._endings]
        self._order = sorted(range(len(everything)), key=lambda number: everything[number])
        self._endings = [self._endings[number] for number in self._order]
        scopes = [ending.scope for ending in self._endings]
        lengths = [ending.span.prompt_len for ending in self._endings]
        each = list(zip(scopes, lengths, strict=True))
        budgets = [own.budget(n) for own, n in each]
        self._prompts = PromptBatch.create(
            [ending.span.row for ending in self._endings],
            lengths,
            [max(n - window, 0) if b < n else 0 for n, b in zip(lengths, budgets, strict=True)],
            req_to_token,
            [max(b - window, 0) for b in budgets],
            [own.protected + own.floor(n) for own, n in each if isinstance(own, Pooled)],
        )
        starts = self._prompts.starts
        protected = [
            ending.protected + starts[p]
            for p, ending in enumerate(self._endings)
            if ending.protected is not None and self._prompts.scored[p]
        ]
        self._protected = torch.cat(protected) if protected else None
        layers, device = self.scope.num_layers, req_to_token.device
        bounds = [own.per_head_bound(n)[:, self._mine].max(axis=1) for own, n in each]
        self._widths = np.minimum(np.stack(bounds), np.array(lengths)[:, None]).max(axis=0)
        # [P, L, H] on the host; on the device for static scopes, whose counts these are.
        self._expected = np.stack([own.expected(n) for own, n in each])
        if not scope.input_dependent:
            self._static = to_device(torch.from_numpy(self._expected), device)
        every = np.repeat(np.array(lengths)[:, None], scope.num_heads, axis=1)
        self._everything_kept = to_device(torch.from_numpy(every), device)
        most = max(len(self.heads.slots(layer)) for layer in range(layers))
        columns = np.full((layers, len(lengths), most), -1, dtype=np.int64)
        for layer in range(layers):
            for p, ending in enumerate(self._endings):
                of_lanes = self.hand_over.columns(layer, ending)
                columns[layer, p, : len(of_lanes)] = of_lanes
        self._columns = to_device(torch.from_numpy(columns), device)

    def _as_server(self, ending: Ending) -> bool:
        """Whether the kernels can take the prompt, with all others of the pass."""
        return not self.book.keep(ending.span.row).has_method and not ending.scope.spans_layers

    def _compress(self, inputs: LayerInputs, windows: list[Tensor | None]) -> None:
        """See the base class, to which it is left where the prompts are not alike."""
        if not self._alike:
            super()._compress(inputs, windows)
        elif inputs.layer not in self.scope.layers:
            choices = self.chooser.choices(inputs.layer, self._endings, {})
            self._hand_over([self._rows(inputs, choices)])
        else:
            self._hand_over([self._rows_of_all(inputs, windows)])

    def _rows_of_all(self, inputs: LayerInputs, windows: list[Tensor | None]) -> LayerRows:
        prompts, layer = self._prompts, inputs.layer
        scores = self._scores_of_all(inputs, [windows[number] for number in self._order])
        if prompts.total and self._exchange is not None and self.chooser.together(self._endings[0]):
            scores = self._exchange.table(scores)
        if prompts.total and self.scorer.spans_heads:
            widths = [scored for scored in prompts.scored if scored]  # those come first
            tables = [self.scorer.combine(table) for table in scores.split(widths, dim=1)]
            scores = torch.cat(tables, dim=1)
        if self._protected is not None:
            scores = protect(scores, self._protected)
        counts = self._counts(layer, scores)
        complete = counts.shape[1] == self.scope.num_heads
        mine = counts[:, self._mine] if complete else counts
        if scores.shape[0] > mine.shape[1]:
            scores = scores[self._mine]
        indices = self.kernels.pick(scores, mine, prompts, int(self._widths[layer]))
        lanes = len(self.heads.slots(layer))
        batch = StoreBatch(prompts, indices, mine, self._columns[layer, :, :lanes])
        choices = []
        for p, (length, scored) in enumerate(zip(prompts.lengths, prompts.scored, strict=True)):
            exact = None
            if not scored:
                exact = np.full(self.scope.num_heads, length, dtype=np.int64)
            elif not self.scope.input_dependent:
                exact = self._expected[p, layer]
            known = counts[p] if complete else None if scored else self._everything_kept[p]
            choices.append(Choice(Kept(mine[p], indices[p]), known, exact))
        return self._rows(inputs, choices, batch)

    def _scores_of_all(self, inputs: LayerInputs, windows: list[Tensor | None]) -> Tensor:
        """``float32 [home heads, scored tokens of all prompts]``."""
        prompts, scorer = self._prompts, self.scorer
        if not prompts.total:
            return inputs.k_pool.new_empty((inputs.k_pool.shape[1], 0), dtype=torch.float32)
        if not scorer.batched:
            parts = [
                self._score(inputs, ending, window)
                for ending, window, scored in zip(
                    self._endings, windows, prompts.scored, strict=True
                )
                if scored
            ]
            return torch.cat(parts, dim=1)
        last = [w for w, scored in zip(windows, prompts.scored, strict=True) if scored]
        q = None
        if last[0] is not None:
            q = last[0][None] if len(last) == 1 else torch.stack(last)  # type: ignore[arg-type]
        return scorer.score_all(q, inputs.k_pool, prompts, scale=inputs.scale)

    def _counts(self, layer: int, scores: Tensor) -> Tensor:
        """``int64 [P, H]`` kept tokens, or of the home heads where others are not known."""
        scope, prompts = self.scope, self._prompts
        if not scope.input_dependent:
            return self._static[:, layer]
        if not prompts.total:
            return self._everything_kept
        rows = scores.shape[0]
        if isinstance(scope, Pooled):
            return self.kernels.shared_counts(scores, prompts, min(scope.group, rows))
        heads = range(rows) if rows == scope.num_heads else self.heads.home
        found = []
        for p, (length, scored) in enumerate(zip(prompts.lengths, prompts.scored, strict=True)):
            at, ending = prompts.starts[p], self._endings[p]
            table = scores[:, at : at + scored]
            if ending.unprotected is not None and scored:
                table = table.index_select(1, ending.unprotected)
            found.append(
                ending.scope.counts(layer, heads, table, length)
                if scored
                else torch.full((rows,), length, dtype=torch.int64, device=scores.device)
            )
        return torch.stack(found)


def make_compressor(
    book: RowBook,
    scorer: Scorer,
    hand_over: HandOver,
    exchange: HomeExchange | None = None,
    rope: Rope | None = None,
    hidden: HiddenScores | None = None,
) -> PromptCompressor:
    """The compressor for this rank's device; arguments as :class:`PromptCompressor` has them."""
    kernels = book.pages.kernels.prompts
    if kernels is None:
        return PromptCompressor(book, scorer, hand_over, exchange, rope, hidden)
    return AllPromptsCompressor(book, scorer, hand_over, exchange, rope, hidden, kernels)

# SPDX-License-Identifier: Apache-2.0
"""Score, select, hand over: what happens to a prompt after its attention.

Runs inside the forward pass, at the heads' homes, when SGLang's pool still holds the full prompt:
layer by layer on a device and where nothing is exchanged, else in groups of layers. Prefill
attention never sees a compressed cache, so the first token is the uncompressed model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairkv_sglang.attention.choose import Chooser
from fairkv_sglang.attention.endings import Choice, Ending, IntArray, LayerRows, StoreBatch
from fairkv_sglang.attention.exchange import HomeExchange
from fairkv_sglang.attention.forward_spans import ForwardSpans, PromptSpan
from fairkv_sglang.attention.groups import EXCHANGED_BYTES, alone, groups
from fairkv_sglang.attention.hand_over import HandOver
from fairkv_sglang.attention.hidden_scores import HiddenScores
from fairkv_sglang.attention.over_layers import choices_of_layers
from fairkv_sglang.attention.repeats import RepeatScorer
from fairkv_sglang.budgets import PromptTensors, Rope, Scorer
from fairkv_sglang.kernels.prompts import to_device
from fairkv_sglang.memory.rows import RowBook


class LayerInputs(NamedTuple):
    """What a layer of a pass is compressed from.

    Attributes:
        layer: Layer index.
        k_pool: ``[slots, n, D]`` prefill pool of the layer, this pass already written.
        v_pool: The same for values.
        scale: Softmax scale.
    """

    layer: int
    k_pool: Tensor
    v_pool: Tensor
    scale: float


class PromptCompressor:
    """Compresses the prompts that end in the current forward pass.

    Args:
        book: Rows of this rank, with its heads and the budget scope.
        scorer: Importance of tokens, where a request does not say otherwise.
        hand_over: Brings kept rows to their owners.
        exchange: What the ranks tell each other of their home heads; None at TP 1.
        rope: The model's rotary embedding; None will do for scorers that do not need it.
        hidden: Scores from hidden states; None where no scorer reads those.
    """

    def __init__(
        self,
        book: RowBook,
        scorer: Scorer,
        hand_over: HandOver,
        exchange: HomeExchange | None = None,
        rope: Rope | None = None,
        hidden: HiddenScores | None = None,
    ) -> None:
        self.book, self.scorer, self.hand_over, self.rope = book, scorer, hand_over, rope
        self.hidden = hidden
        self.scope = book.scope
        self.heads = heads = book.heads
        self._computed: dict[int, Tensor] = {}  # row -> slots so far, where the scorer observes
        self._repeats = RepeatScorer(scorer) if scorer.repeats else None
        self._endings: list[Ending] = []
        self._group: list[tuple[LayerInputs, dict[int, Tensor]]] = []  # scored, not exchanged yet
        self._group_ends: set[int] = set()  # layers after which is exchanged
        self._late: list[LayerInputs] = []  # layers of prompts that wait for the last one
        self._home = torch.tensor(heads.home, device=book.pages.device)
        self.chooser = Chooser(self.scope, heads, self._home, self._scorer)
        self._exchange = exchange

    def begin(self, spans: ForwardSpans, req_to_token: Tensor) -> None:
        """Look up the slots and owners of the prompts that end in this pass.

        Args:
            spans: The pass.
            req_to_token: SGLang's request table ``[rows, context]``.
        """
        source = self.heads.homes.source
        self._endings, self._late, self._group = [], [], []
        self.hand_over.forget()
        for span in spans.last:
            owners = self.book.owners(span.row).astype(np.int64)
            slots = req_to_token[span.row, : span.prompt_len].long()
            sources = source[np.arange(source.shape[0])[None, :], owners]
            self._endings.append(self._ending(span, slots, owners, sources))
        layers = self.scope.num_layers
        self._group_ends = {group[-1] for group in self._groups(layers, self._exchanged_bytes)}
        self._computed = {
            s.row: req_to_token[s.row, : s.end].long()
            for s in spans.prompts
            if s.repeat is None and self._scorer(s.row).observes
        }
        if self._repeats is not None:
            self._repeats.begin(spans, req_to_token)

    def _groups(self, layers: int, sizes: Callable[[], Sequence[int]]) -> list[range]:
        """Which of so many layers share an exchange: the same on all ranks, as their sizes in bytes
        are. Those are not asked for where each layer is alone.
        """
        if self._exchange is None or self.hand_over.overlaps:
            return alone(layers)
        return groups(sizes(), EXCHANGED_BYTES)

    def _exchanged_bytes(self) -> list[int]:
        """Of each layer: scores that all ranks need, and rows that are expected to travel."""
        found = np.zeros(self.scope.num_layers)
        for ending in self._endings:
            length = ending.span.prompt_len
            moved = ending.scope.expected(length) * (ending.sources != ending.owners)
            found += moved.sum(axis=1) * self.hand_over.row_bytes
            if ending.compressed and self.chooser.together(ending):
                found[list(self.scope.layers)] += 4.0 * length * self.scope.num_heads
        return found.astype(int).tolist()

    def _scorer(self, row: int) -> Scorer:
        """The request's own, or the server's."""
        return self.book.keep(row).scorer or self.scorer

    def _ending(
        self, span: PromptSpan, slots: Tensor, owners: IntArray, sources: IntArray
    ) -> Ending:
        keep, device = self.book.keep(span.row), slots.device
        scope = keep.scope(self.scope, span.prompt_len)
        ending = Ending(span, slots, owners, sources, scope)
        if scope.protected:
            scored = span.prompt_len - self._scorer(span.row).window
            protected = keep.positions(scored)
            others = np.delete(np.arange(scored), protected)
            ending.protected = to_device(torch.from_numpy(protected), device)
            ending.unprotected = to_device(torch.from_numpy(others), device)
        return ending

    def layer(
        self,
        layer: int,
        q: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        spans: ForwardSpans,
        scale: float,
    ) -> None:
        """Look at a layer, and compress it if it is the last one of a group, with the group.

        Args:
            layer: Layer index.
            q: ``[tokens, n, g, D]`` queries of this pass for the home heads, RoPE applied; g counts
                the query heads that are here.
            k_pool: ``[slots, n, D]`` prefill pool of the layer, this pass already written.
            v_pool: The same for values.
            spans: The pass.
            scale: Softmax scale of the layer.
        """
        inputs = LayerInputs(layer, k_pool, v_pool, scale)
        windows: list[Tensor | None] = [None] * len(spans.prompts)
        if layer in self.scope.layers:
            windows = [self._window(layer, q, span) for span in spans.prompts]
            self._observe(inputs, q, spans)
            if self._repeats is not None:
                self._repeats.layer(layer, q, k_pool, scale)
        self.hand_over.finish()  # of the layer before, which travelled while this one was computed
        if not self._endings:
            return
        ending = [
            window for window, span in zip(windows, spans.prompts, strict=True) if span.is_last
        ]
        self._compress(inputs, ending)
        if layer == self.scope.num_layers - 1:
            self._hand_over_late()
            self.hand_over.finish()
            self._finish()

    def _compress(self, inputs: LayerInputs, windows: list[Tensor | None]) -> None:
        """Score the layer; the last one of a group ends with the hand-over of the group."""
        self._group.append((inputs, self._home_scores(inputs, windows)))
        if inputs.layer not in self._group_ends:
            return
        group, self._group = self._group, []
        self._share_scores([scores for _, scores in group])
        rows = []
        for of_layer, scores in group:
            choices = self.chooser.choices(of_layer.layer, self._endings, scores)
            rows.append(self._rows(of_layer, choices))
            scores.clear()  # the memory is free before rows are packed
        self._hand_over(rows)

    def _hand_over_late(self) -> None:
        """Of the prompts whose tokens could not be selected before the last layer."""
        late = [ending for ending in self._endings if ending.waits]
        choices = [choices_of_layers(ending, self._home) for ending in late]
        rows = [
            LayerRows(inputs.layer, late, of_layer, inputs.k_pool, inputs.v_pool)
            for inputs, *of_layer in zip(self._late, *choices, strict=True)
        ]
        for group in self._groups(len(rows), lambda: list(map(self.hand_over.most_bytes, rows))):
            self.hand_over.finish()
            self.hand_over.start(rows[group.start : group.stop])

    def _window(self, layer: int, q: Tensor, span: PromptSpan) -> Tensor | None:
        """Last queries of the prompt up to this span; carried over when more chunks follow."""
        if span.repeat is not None:  # it holds nothing yet, and is not compressed by this pass
            return None
        scorer = self._scorer(span.row)
        if not scorer.needs_queries:
            return None
        size = scorer.window
        tail = q[span.start : span.start + span.length][-size:]
        tails = self.book.tails(span.row)
        carried = tails.pop(layer, None)
        if carried is not None and tail.shape[0] < size:
            tail = torch.cat([carried, tail])[-size:]
        if not span.is_last:
            tails[layer] = tail.clone()
        return tail

    def _observe(self, inputs: LayerInputs, q: Tensor, spans: ForwardSpans) -> None:
        """Shows scorers that observe the queries of this pass."""
        for span in spans.prompts:
            if span.row not in self._computed:
                continue
            scope = self.book.keep(span.row).scope(self.scope, span.prompt_len)
            if scope.budget(span.prompt_len) >= span.prompt_len:
                continue  # keeps everything
            seen = self.book.seen(span.row)
            k = inputs.k_pool.index_select(0, self._computed[span.row])
            queries = q[span.start : span.start + span.length]
            part = PromptTensors(queries, k, inputs.scale, rope=self.rope)
            seen[inputs.layer] = self._scorer(span.row).observe(seen.get(inputs.layer), part)

    def _rows(
        self, inputs: LayerInputs, choices: list[Choice], batch: StoreBatch | None = None
    ) -> LayerRows:
        """What is handed over of a layer now: of prompts that do not wait for the last layer."""
        ready = self._endings
        if inputs.layer in self.scope.layers:
            ready = [ending for ending in self._endings if not ending.waits]
        if len(ready) < len(self._endings):
            self._late.append(inputs)
        for ending, choice in zip(ready, choices, strict=True):
            known = choice.kept.counts if choice.counts is None else choice.counts
            ending.counts[inputs.layer] = known
        return LayerRows(inputs.layer, ready, choices, inputs.k_pool, inputs.v_pool, batch)

    def _hand_over(self, rows: Sequence[LayerRows]) -> None:
        """Bring what is kept to its owners, after they have learnt how much that is."""
        if self._exchange is not None:
            travelling = [layer for layer in rows if self.hand_over.moves(layer)]
            unknown = [c for layer in travelling for c in layer.choices if c.counts is None]
            if unknown:  # scopes that look at a rank's own heads
                self.chooser.learn_counts(unknown, self._exchange)
        self.hand_over.start(rows)

    def _home_scores(self, inputs: LayerInputs, windows: list[Tensor | None]) -> dict[int, Tensor]:
        """Of the home heads, by number of the ending prompt; of those that are compressed."""
        if inputs.layer not in self.scope.layers:  # of a sliding window everything is kept
            return {}
        return {
            number: self._score(inputs, ending, windows[number])
            for number, ending in enumerate(self._endings)
            if ending.compressed
        }

    def _share_scores(self, layers: list[dict[int, Tensor]]) -> None:
        """Puts the scores of all heads in the place of the home heads' where they are needed."""
        shared = [
            (scores, number)
            for scores in layers
            for number in scores
            if self.chooser.together(self._endings[number])
        ]
        if shared and self._exchange is not None:
            tables = self._exchange.scores([scores[number] for scores, number in shared])
            for (scores, number), table in zip(shared, tables, strict=True):
                scores[number] = table

    def _score(self, inputs: LayerInputs, ending: Ending, window: Tensor | None) -> Tensor:
        """``float32 [home heads, N - window]`` of a prompt."""
        row, slots = ending.span.row, ending.slots
        scorer = self._scorer(row)
        seen = self.book.seen(row).pop(inputs.layer) if scorer.observes else None
        if ending.span.context is not None:
            seen = ending.span.context.scores[inputs.layer]
        if scorer.reads_hidden and self.hidden is not None:
            seen = self.hidden.of(inputs.layer, slots)
        values = inputs.v_pool.index_select(0, slots) if scorer.needs_values else None
        return scorer.score_prompt(
            PromptTensors(
                q=window,
                k=inputs.k_pool.index_select(0, slots),
                scale=inputs.scale,
                v=values,
                layer=inputs.layer,
                heads=self.heads.home,
                rope=self.rope,
                seen=seen,
            )
        )

    def _finish(self) -> None:
        """After the last layer: kept counts of all heads to the host, equal on all ranks."""
        for ending in self._endings:
            if not ending.scope.input_dependent:
                continue
            # Of a layer with a sliding window all ranks know all counts.
            counts = [ending.counts[layer] for layer in range(self.scope.num_layers)]
            fewest = min(map(len, counts))
            known = [c if len(c) == fewest else c[self._home] for c in counts]
            kept = torch.stack(known)
            if kept.shape[1] < self.scope.num_heads and self._exchange is not None:
                kept = self._exchange.counts(kept)
            self.book.note_kept(ending.span.row, _to_host(kept))
        self._endings, self._late = [], []


def _to_host(counts: Tensor) -> Tensor:
    """Counts in host memory; on CUDA the copy ends before SGLang reads the pass's result."""
    if counts.device.type == "cpu":
        return counts
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    host.copy_(counts, non_blocking=True)
    return host

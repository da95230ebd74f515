# SPDX-License-Identifier: Apache-2.0
"""Score, select, hand over: what happens to a prompt after its attention.

Runs layer by layer inside the forward pass, at the heads' homes, when SGLang's pool still holds
the full prompt. Prefill attention never sees a compressed cache, so the first token is the
uncompressed model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairkv_sglang.attention.exchange import HomeExchange
from fairkv_sglang.attention.forward_spans import ForwardSpans, PromptSpan
from fairkv_sglang.attention.hand_over import Choice, Ending, HandOver, IntArray, StoreBatch
from fairkv_sglang.attention.hidden_scores import HiddenScores
from fairkv_sglang.attention.over_layers import choices_of_layers
from fairkv_sglang.attention.repeats import RepeatScorer
from fairkv_sglang.budgets import Kept, PromptTensors, Rope, Scorer, pick
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
        self._layers: list[LayerInputs] = []  # so far, if something waits for the last one
        self._batch: StoreBatch | None = None
        self._home = torch.tensor(heads.home, device=book.pages.device)
        self._exchange = exchange

    def begin(self, spans: ForwardSpans, req_to_token: Tensor) -> None:
        """Look up the slots and owners of the prompts that end in this pass.

        Args:
            spans: The pass.
            req_to_token: SGLang's request table ``[rows, context]``.
        """
        source = self.heads.homes.source
        self._endings, self._layers = [], []
        self.hand_over.forget()
        for span in spans.last:
            owners = self.book.owners(span.row).astype(np.int64)
            slots = req_to_token[span.row, : span.prompt_len].long()
            sources = source[np.arange(source.shape[0])[None, :], owners]
            self._endings.append(self._ending(span, slots, owners, sources))
        self._computed = {
            s.row: req_to_token[s.row, : s.end].long()
            for s in spans.prompts
            if s.repeat is None and self._scorer(s.row).observes
        }
        if self._repeats is not None:
            self._repeats.begin(spans, req_to_token)

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
        """Compress one layer.

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
        ready, choices = self._select(inputs, ending)
        self.hand_over.start(layer, ready, choices, k_pool, v_pool, self._batch)
        if len(ready) < len(self._endings):
            self._layers.append(inputs)
        if layer == self.scope.num_layers - 1:
            self._hand_over_all_layers()
            self.hand_over.finish()
            self._finish()

    def _hand_over_all_layers(self) -> None:
        """Of the prompts whose tokens could not be selected before the last layer."""
        waiting = [ending for ending in self._endings if ending.waits]
        choices = [choices_of_layers(ending, self._home) for ending in waiting]
        for inputs, *of_layer in zip(self._layers, *choices, strict=True):
            self.hand_over.finish()
            self.hand_over.start(inputs.layer, waiting, of_layer, inputs.k_pool, inputs.v_pool)

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

    def _select(
        self, inputs: LayerInputs, windows: list[Tensor | None]
    ) -> tuple[list[Ending], list[Choice]]:
        """Prompts whose tokens can be selected now, and what each keeps in the layer, known to whom
        it has to be.
        """
        choices = self._choices(inputs, windows)
        ready = self._endings
        if inputs.layer in self.scope.layers:
            ready = [ending for ending in self._endings if not ending.waits]
        for ending, choice in zip(ready, choices, strict=True):
            known = choice.kept.counts if choice.counts is None else choice.counts
            ending.counts[inputs.layer] = known
        if self._exchange is not None and self.hand_over.moves(inputs.layer, ready):
            for choice in choices:
                if choice.counts is None:  # scope rank: owners elsewhere have to be told
                    choice.counts = self._exchange.counts(choice.kept.counts)
                    choice.exact = _on_host(choice.counts)
        return ready, choices

    def _choices(self, inputs: LayerInputs, windows: list[Tensor | None]) -> list[Choice]:
        """What each ending prompt keeps in the layer; scores of those that wait are set aside."""
        if self.scope.sliding is not None and inputs.layer not in self.scope.layers:
            lengths = [ending.span.prompt_len for ending in self._endings]
            return [self._latest(n, self.scope.sliding.kept(n)) for n in lengths]
        scores = {
            number: self._score(inputs, ending, windows[number])
            for number, ending in enumerate(self._endings)
            if ending.compressed
        }
        shared = [number for number in scores if self._together(self._endings[number])]
        if shared and self._exchange is not None:
            tables = self._exchange.scores([scores[number] for number in shared])
            scores |= zip(shared, tables, strict=True)
        choices = []
        for number, ending in enumerate(self._endings):
            if not ending.compressed:
                # no scores are needed, on any rank
                choices.append(self._latest(ending.span.prompt_len, ending.span.prompt_len))
                continue
            table, scorer = scores[number], self._scorer(ending.span.row)
            if scorer.spans_heads:
                table = scorer.combine(table)
            if ending.protected is not None:
                table = protect(table, ending.protected)
            if ending.waits:
                ending.scores.append(table)
            else:
                choices.append(self._choose(inputs.layer, table, ending))
        return choices

    def _together(self, ending: Ending) -> bool:
        """Whether every rank needs its scores of all heads of a layer."""
        # Replicas of a head have a part of its query heads each, so no rank can score it alone.
        together = ending.scope.spans_ranks or self.heads.homes.replicas > 1
        return together or self._scorer(ending.span.row).spans_heads

    def _latest(self, length: int, tokens: int) -> Choice:
        """The last ``tokens`` of a prompt of ``length``."""
        exact = np.full(self.scope.num_heads, tokens, dtype=np.int64)
        counts = torch.full(exact.shape, tokens, dtype=torch.int64, device=self._home.device)
        latest = torch.arange(length - tokens, length, device=counts.device)
        indices = latest.repeat(len(self._home), 1)
        return Choice(Kept(counts[self._home], indices), counts, exact)

    def _choose(self, layer: int, scores: Tensor, ending: Ending) -> Choice:
        """From ``scores`` of all heads ``[H, M]``, or of the home heads where that is enough."""
        scope, length = ending.scope, ending.span.prompt_len
        home = self.heads.home
        unprotected = scores
        if ending.unprotected is not None:
            unprotected = scores.index_select(1, ending.unprotected)
        if not scope.input_dependent:
            exact: IntArray | None = np.array(scope.expected(length)[layer])
            counts = torch.tensor(exact).to(scores.device, non_blocking=True)
        else:
            groups: Sequence[Sequence[int]] = [range(scope.num_heads)]
            if not scope.spans_ranks:
                every, size = range(scope.num_heads), scope.home_size
                groups = [every[i : i + size] for i in range(0, scope.num_heads, size)]
            if scores.shape[0] < scope.num_heads:
                mine = scope.counts(layer, home, unprotected, length)
                return Choice(self._pick(layer, scores, mine, ending, None), None, None)
            counts = torch.cat(
                [scope.counts(layer, g, unprotected[g[0] : g[-1] + 1], length) for g in groups]
            )
            exact = _on_host(counts)
        mine = scores if scores.shape[0] < scope.num_heads else scores[self._home]
        kept = self._pick(layer, mine, counts[self._home], ending, exact)
        return Choice(kept, counts, exact)

    def _pick(
        self, layer: int, scores: Tensor, counts: Tensor, ending: Ending, exact: IntArray | None
    ) -> Kept:
        """Positions of the home heads; their table is as wide as could be where nothing waits."""
        home, length = list(self.heads.home), ending.span.prompt_len
        most = ending.scope.per_head_bound(length)[layer] if exact is None else exact
        return pick(scores, counts, length, min(int(most[home].max()), length))

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
        self._endings, self._layers = [], []


def protect(scores: Tensor, positions: Tensor) -> Tensor:
    """``scores [n, M]`` with those of protected tokens above all others."""
    # not even an infinite score stands beside them
    return scores.clamp(max=torch.finfo(scores.dtype).max).index_fill(1, positions, torch.inf)


def _on_host(counts: Tensor) -> IntArray | None:
    """Counts that are in host memory already; on a device nobody waits for them."""
    return counts.numpy() if counts.device.type == "cpu" else None


def _to_host(counts: Tensor) -> Tensor:
    """Counts in host memory; on CUDA the copy ends before SGLang reads the pass's result."""
    if counts.device.type == "cpu":
        return counts
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    host.copy_(counts, non_blocking=True)
    return host

# SPDX-License-Identifier: Apache-2.0
"""Scores a context in the passes that repeat it (``memory/contexts.py``), layer by layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fairkv_sglang.attention.forward_spans import ForwardSpans
from fairkv_sglang.budgets import Scorer
from fairkv_sglang.budgets.repeats import PassPart
from fairkv_sglang.memory.contexts import Repeat


class _Part(NamedTuple):
    repeat: Repeat
    rows: slice  # queries of the pass that stand behind the prompt
    slots: Tensor  # of the keys that they are scored against
    sinks: int
    ends: bool


class RepeatScorer:
    """Shows the scorer the part of each pass that repeats a chunk.

    Args:
        scorer: The scorer, one that ``repeats``.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._parts: list[_Part] = []

    def begin(self, spans: ForwardSpans, req_to_token: Tensor) -> None:
        """Look up where keys are; arguments as :meth:`PromptCompressor.begin` has them."""
        self._parts = []
        for span in spans.prompts:
            repeat = span.repeat
            if repeat is None or span.end <= len(repeat.context.tokens):
                continue
            behind = len(repeat.context.tokens)
            sinks = min(self.scorer.sink, repeat.start)
            row = req_to_token[span.row]
            ranges = ((0, sinks), (repeat.start, repeat.end), (behind, span.end))
            slots = torch.cat([row[start:end] for start, end in ranges]).long()
            skipped = max(behind - (span.end - span.length), 0)
            rows = slice(span.start + skipped, span.start + span.length)
            ends = span.end == behind + len(repeat.tokens)
            self._parts.append(_Part(repeat, rows, slots, sinks, ends))

    def layer(self, layer: int, q: Tensor, k_pool: Tensor, scale: float) -> None:
        """Score one layer; arguments as :meth:`PromptCompressor.layer` has them."""
        for repeat, rows, slots, sinks, ends in self._parts:
            start, end, scores = repeat.start, repeat.end, repeat.context.scores
            keys = k_pool.index_select(0, slots)
            part = PassPart(q[rows], keys, sinks, end - start, scale, ends)
            seen = self.scorer.attend(repeat.seen.pop(layer, None), part)
            if not ends:
                repeat.seen[layer] = seen
                continue
            if layer not in scores:
                shape = keys.shape[1], len(repeat.context.tokens)
                scores[layer] = torch.zeros(shape, dtype=torch.float32, device=keys.device)
            scores[layer][:, start:end] = seen.most

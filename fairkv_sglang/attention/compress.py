# SPDX-License-Identifier: Apache-2.0
"""Score, select, copy into head pages: what happens to a prompt after its attention.

Runs layer by layer inside the forward pass, when the pool still holds the full prompt. Prefill
attention never sees a compressed cache, so the first token is the uncompressed model's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairkv_sglang.attention.exchange import LayerExchange, gather_counts
from fairkv_sglang.attention.forward_plan import ForwardPlan, PromptSpan
from fairkv_sglang.budgets import Kept, pick
from fairkv_sglang.budgets.scorers.snapkv import SnapKV
from fairkv_sglang.kernels import ops
from fairkv_sglang.runtime import FairKVRuntime


@dataclass
class _Prompt:
    span: PromptSpan
    slots: Tensor  # int64 [N] pool slots of the prompt
    counts: list[Tensor] = field(default_factory=list)  # per layer: [H], or [n] of own lanes


class PromptCompressor:
    """Compresses the prompts that end in the current forward pass.

    Args:
        runtime: This rank.
        device_group: Process group of the ranks, for tensors on their device; None at TP 1.
    """

    def __init__(
        self, runtime: FairKVRuntime, device_group: torch.distributed.ProcessGroup | None
    ) -> None:
        self.runtime = runtime
        self.group = device_group
        # row -> layer -> last queries so far [<=W, n, g, D]
        self._tails: dict[int, dict[int, Tensor]] = {}
        self._prompts: list[_Prompt] = []
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._exchange = (
            LayerExchange(runtime.plan, runtime.heads, device_group)
            if runtime.scope.spans_ranks and device_group is not None
            else None
        )

    def begin(self, plan: ForwardPlan, req_to_token: Tensor) -> None:
        """Look up the slots of the prompts that end in this pass.

        Args:
            plan: The pass.
            req_to_token: SGLang's request table ``[rows, context]``.
        """
        self._prompts = [
            _Prompt(span, req_to_token[span.row, : span.prompt_len].long()) for span in plan.last
        ]
        # A row starts anew when its span starts before any carried query could exist.
        for span in plan.spans:
            if span.end == span.length:
                self._tails.pop(span.row, None)

    def layer(
        self, layer: int, q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: ForwardPlan, scale: float
    ) -> None:
        """Compress one layer.

        Args:
            layer: Layer index.
            q: ``[tokens, n, g, D]`` queries of this pass, RoPE applied.
            k_pool: ``[slots, n, D]`` prefill pool of the layer, this pass already written.
            v_pool: The same for values.
            plan: The pass.
            scale: Softmax scale of the layer.
        """
        windows = [self._window(layer, q, span) for span in plan.spans]
        if not self._prompts:
            return
        ending = [window for window, span in zip(windows, plan.spans, strict=True) if span.is_last]
        kept = self._select(layer, ending, k_pool, scale)
        pages = self.runtime.book.pages
        lane = self.runtime.heads.lane_start[layer]
        for prompt, choice in zip(self._prompts, kept, strict=True):
            ops.store_kept(
                pages,
                prompt.span.row,
                lane,
                k_pool,
                v_pool,
                prompt.slots,
                choice.indices,
                choice.counts,
            )
        if layer == self.runtime.plan.num_layers - 1:
            self._finish()

    def _window(self, layer: int, q: Tensor, span: PromptSpan) -> Tensor | None:
        """Last queries of the prompt up to this span; carried over when more chunks follow."""
        size = self.runtime.scorer.window if self.runtime.scorer.needs_queries else 0
        if size == 0:
            return None
        tail = q[span.start : span.start + span.length][-size:]
        carried = self._tails.get(span.row, {}).pop(layer, None)
        if carried is not None and tail.shape[0] < size:
            tail = torch.cat([carried, tail])[-size:]
        if not span.is_last:
            self._tails.setdefault(span.row, {})[layer] = tail.clone()
        return tail

    def _select(
        self, layer: int, windows: list[Tensor | None], k_pool: Tensor, scale: float
    ) -> list[Kept]:
        """Kept tokens of this rank's lanes of the layer, one entry per ending prompt."""
        chosen: dict[int, Kept] = {}
        scored: list[int] = []
        for number, prompt in enumerate(self._prompts):
            if self.runtime.scope.budget(prompt.span.prompt_len) >= prompt.span.prompt_len:
                chosen[number] = self._everything(layer, prompt)
            else:
                scored.append(number)
        if scored:
            select = self._select_here if self._exchange is None else self._select_together
            parts = select(layer, scored, windows, k_pool, scale)
            chosen.update(zip(scored, parts, strict=True))
        return [chosen[number] for number in range(len(self._prompts))]

    def _everything(self, layer: int, prompt: _Prompt) -> Kept:
        """A prompt within its budget: no scores are needed, on any rank."""
        length, device = prompt.span.prompt_len, prompt.slots.device
        lanes = len(self.runtime.heads.heads[layer])
        counts = torch.full((lanes,), length, dtype=torch.int64, device=device)
        everyone = self.runtime.plan.num_kv_heads if self._exchange is not None else lanes
        prompt.counts.append(counts.new_full((everyone,), length))
        indices = torch.arange(length, device=device).expand(lanes, -1).contiguous()
        return Kept(counts=counts, indices=indices)

    def _select_here(
        self,
        layer: int,
        numbers: list[int],
        windows: list[Tensor | None],
        k_pool: Tensor,
        scale: float,
    ) -> list[Kept]:
        """Scores and choice of this rank alone: static scopes, scope ``rank``, TP 1."""
        kept = []
        for number in numbers:
            prompt = self._prompts[number]
            scores = self._score(windows[number], k_pool[prompt.slots], scale)
            heads = self.runtime.heads.heads[layer]
            choice = self.runtime.scope.select(layer, heads, scores, prompt.span.prompt_len)
            prompt.counts.append(choice.counts)
            kept.append(choice)
        return kept

    def _select_together(
        self,
        layer: int,
        numbers: list[int],
        windows: list[Tensor | None],
        k_pool: Tensor,
        scale: float,
    ) -> list[Kept]:
        """Every rank scores its primary heads, and all choose from the scores of all heads."""
        if self._exchange is None:
            raise RuntimeError("FairKV: no process group to exchange scores with")
        scope = self.runtime.scope
        primary = self._index(self.runtime.heads.primary[layer], k_pool.device)
        mine = []
        for number in numbers:
            window = windows[number]
            keys = k_pool[self._prompts[number].slots][:, primary]
            mine.append(self._score(None if window is None else window[:, primary], keys, scale))
        own = self._index(self.runtime.heads.heads[layer], k_pool.device)
        kept = []
        for number, scores in zip(numbers, self._exchange.gather(layer, mine), strict=True):
            prompt = self._prompts[number]
            length = prompt.span.prompt_len
            counts = scope.counts(layer, range(scope.num_heads), scores, length)
            prompt.counts.append(counts)
            kept.append(pick(scores[own], counts[own], length))
        return kept

    def _index(self, heads: tuple[int, ...], device: torch.device) -> Tensor:
        """Head numbers as a tensor on the device, made once: each copy there would wait for it."""
        if heads not in self._indices:
            self._indices[heads] = torch.tensor(heads, dtype=torch.int64, device=device)
        return self._indices[heads]

    def _score(self, window: Tensor | None, keys: Tensor, scale: float) -> Tensor:
        if window is None:
            shape = (0, keys.shape[1], self.runtime.heads.group_size, keys.shape[2])
            window = keys.new_empty(shape)
        scorer = self.runtime.scorer
        if keys.is_cuda and isinstance(scorer, SnapKV) and keys.shape[0] > scorer.window:
            # One fused kernel over all heads; tests compare it with the scorer itself.
            return ops.snapkv_score(window, keys, scale, scorer.kernel, scorer.pooling)
        return scorer.score(window, keys, scale=scale)

    def _finish(self) -> None:
        """After the last layer: kept counts of all heads to the host, equal on all ranks."""
        book = self.runtime.book
        for prompt in self._prompts:
            self._tails.pop(prompt.span.row, None)
            if not self.runtime.scope.input_dependent:
                continue
            if self._exchange is not None or self.group is None:
                kept = self._by_head(prompt.counts)
            else:
                kept = gather_counts(self.runtime, prompt.counts, self.group)
            book.note_kept(prompt.span.row, _to_host(kept))
        self._prompts = []

    def _by_head(self, counts: list[Tensor]) -> Tensor:
        """``[L, H]`` from per-layer counts: of all heads, or (TP 1) in the plan's head order."""
        if self._exchange is not None:
            return torch.stack(counts)
        table = torch.stack(counts)
        order = torch.tensor(self.runtime.heads.heads, device=table.device)
        return torch.empty_like(table).scatter_(1, order, table)


def _to_host(counts: Tensor) -> Tensor:
    """Counts in host memory; on CUDA the copy ends before SGLang reads the pass's result."""
    if counts.device.type == "cpu":
        return counts
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    host.copy_(counts, non_blocking=True)
    return host

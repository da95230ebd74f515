# SPDX-License-Identifier: Apache-2.0
"""From scores to kept tokens: counts of all heads, positions of the home heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fairkv_sglang.attention.endings import Choice, Ending, IntArray
from fairkv_sglang.attention.exchange import HomeExchange
from fairkv_sglang.budgets import BudgetScope, Kept, Scorer, pick
from fairkv_sglang.parallel import RankHeads


class Chooser:
    """Chooses what prompts keep in a layer, one after the other.

    Args:
        scope: The server's budget scope.
        heads: This rank's heads.
        home: ``int64 [n]`` its home heads, on the device.
        scorer_of: The scorer of a row.
    """

    def __init__(
        self,
        scope: BudgetScope,
        heads: RankHeads,
        home: Tensor,
        scorer_of: Callable[[int], Scorer],
    ) -> None:
        self.scope, self.heads, self.scorer_of = scope, heads, scorer_of
        self._home = home

    def choices(
        self, layer: int, endings: Sequence[Ending], scores: Mapping[int, Tensor]
    ) -> list[Choice]:
        """What each ending prompt keeps in the layer; scores of those that wait are set aside.

        Args:
            layer: Layer index.
            endings: The prompts.
            scores: By number of the prompt ``float32 [H, N - window]``, or of the home heads where
                that is enough; of those that are compressed.
        """
        if self.scope.sliding is not None and layer not in self.scope.layers:
            lengths = [ending.span.prompt_len for ending in endings]
            return [self._latest(n, self.scope.sliding.kept(n)) for n in lengths]
        choices = []
        for number, ending in enumerate(endings):
            if not ending.compressed:
                # no scores are needed, on any rank
                choices.append(self._latest(ending.span.prompt_len, ending.span.prompt_len))
                continue
            table, scorer = scores[number], self.scorer_of(ending.span.row)
            if scorer.spans_heads:
                table = scorer.combine(table)
            if ending.protected is not None:
                table = protect(table, ending.protected)
            if ending.waits:
                ending.scores.append(table)
            else:
                choices.append(self._choose(layer, table, ending))
        return choices

    def learn_counts(self, choices: Sequence[Choice], exchange: HomeExchange) -> None:
        """Counts of all heads, from their homes, for choices of which each home knows its own."""
        counts_of = exchange.counts(torch.stack([choice.kept.counts for choice in choices]))
        for choice, counts in zip(choices, counts_of, strict=True):
            choice.counts, choice.exact = counts, _on_host(counts)

    def together(self, ending: Ending) -> bool:
        """Whether every rank needs its scores of all heads of a layer."""
        # Replicas of a head have a part of its query heads each, so no rank can score it alone.
        together = ending.scope.spans_ranks or self.heads.homes.replicas > 1
        return together or self.scorer_of(ending.span.row).spans_heads

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


def protect(scores: Tensor, positions: Tensor) -> Tensor:
    """``scores [n, M]`` with those of protected tokens above all others."""
    # not even an infinite score stands beside them
    return scores.clamp(max=torch.finfo(scores.dtype).max).index_fill(1, positions, torch.inf)


def _on_host(counts: Tensor) -> IntArray | None:
    """Counts that are in host memory already; on a device nobody waits for them."""
    return counts.numpy() if counts.device.type == "cpu" else None

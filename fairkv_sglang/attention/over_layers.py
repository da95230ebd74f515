# SPDX-License-Identifier: Apache-2.0
"""Selection after the last layer, for scopes whose budget is shared by all layers.

Scores of each layer are set aside while the layers are computed. SGLang's pool holds the rows of
all layers until the pass has ended, so they are handed over then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairkv_sglang.attention.endings import Choice, Ending
from fairkv_sglang.budgets import pick


def choices_of_layers(ending: Ending, home: Tensor) -> list[Choice]:
    """What a prompt keeps in each layer with a budget; its scores are given up.

    Counts are copied to the host, which waits for them: once for each prompt, and all-to-alls then
    carry no more than the rows that move, of which the bound would be many times as many.

    Args:
        ending: With the scores of all layers, equal on all ranks.
        home: ``int64 [n]`` heads of this rank's pool.
    """
    scope, length = ending.scope, ending.span.prompt_len
    scores = torch.stack(ending.scores)  # [L, H, M]
    ending.scores.clear()
    layers, heads, _ = scores.shape
    free = scores if ending.unprotected is None else scores.index_select(2, ending.unprotected)
    counts = scope.counts(0, range(layers * heads), free.flatten(0, 1), length).view(layers, heads)
    exact = counts.cpu().numpy()
    ending.counts |= zip(scope.layers, counts, strict=True)
    mine, widths = counts[:, home], exact[:, home.cpu().numpy()].max(axis=1)
    return [
        Choice(pick(table[home], mine[i], length, int(widths[i])), counts[i], exact[i])
        for i, table in enumerate(scores)
    ]

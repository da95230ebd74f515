# SPDX-License-Identifier: Apache-2.0
"""Several query tokens of a request in one decode step, to check drafts of speculative decoding.

Kernels take one token of a row, which sees all that the row holds. A draft of T tokens is T such
rows with the pages of their request, each shorter by the tokens that come after it, so every decode
kernel checks drafts as it is. No server calls this yet: ``docs/distributed.md`` says what is
missing.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .pages import HeadPages


def with_drafts(pages: HeadPages, rows: torch.Tensor, tokens: int) -> HeadPages:
    """Pages in which row ``i * tokens + t`` is request i as its draft's token t sees it.

    The drafts' keys and values are in the pages already: ``grow`` and ``append``, once for each
    token. Arena and runs are the same tensors; page tables, lengths and ownership of the requests
    are copied, on their device, without waiting for it. It is for ``decode`` only.

    Args:
        pages: What the rank holds.
        rows: int64 [bs] of the requests; the padding row may stand for none.
        tokens: T, equal for all; a chain, of which each token sees those before it.
    """
    each = rows.repeat_interleave(tokens)
    after = torch.arange(tokens - 1, -1, -1, dtype=torch.int32, device=rows.device)
    lens = pages.lens[each] - after.repeat(rows.shape[0])[:, None]
    return replace(
        pages,
        page_table=pages.page_table[each],
        lens=lens.clamp_(min=0),
        owned=pages.owned[each],
        _host=None,
    )

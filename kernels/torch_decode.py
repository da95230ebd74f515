# SPDX-License-Identifier: Apache-2.0
"""Decode attention over head pages in plain torch: slow, obvious, on any device.

`--fairkv-decode-backend torch` serves with it, and it is the oracle of every decode kernel.
"""

from __future__ import annotations

import torch

from .pages import PAGE_TOKENS, HeadPages


def gather(pages: HeadPages, row: int, lane: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V rows ``[len, D]`` that (row, lane) holds, in order, copied out of the pages."""
    n = int(pages.lens[row, lane])
    ids = pages.page(row, lane, torch.arange(-(-n // PAGE_TOKENS), device=pages.device)).long()
    k, v = pages.keys[ids], pages.v_pages[ids]
    return k.reshape(-1, pages.head_dim)[:n], v.reshape(-1, pages.head_dim)[:n]


def decode(
    pages: HeadPages,
    q: torch.Tensor,
    rows: torch.Tensor,
    lane_lo: int,
    n: int,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> None:
    g = q.shape[1] // n
    out.zero_()
    for i, r in enumerate(rows.tolist()):
        for h in range(n):
            k, v = (t.double() for t in gather(pages, r, lane_lo + h))
            if pages.owned[r, lane_lo + h] and len(k):
                mine = slice(h * g, (h + 1) * g)
                logits = q[i, mine].double() @ k.T * scale
                if sinks is not None:
                    logits = torch.cat([logits, sinks[mine, None].double()], dim=1)
                out[i, mine] = (logits.softmax(-1)[:, : len(k)] @ v).to(out.dtype)

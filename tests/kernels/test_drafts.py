# SPDX-License-Identifier: Apache-2.0
"""A draft checked in one step equals its tokens written one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fairkv_sglang.kernels import HeadPages, torch_decode
from fairkv_sglang.kernels.drafts import with_drafts

LENS = [[0, 0, 0], [1, 15, 16], [255, 31, 300], [4, 0, 14]]
OWNED = [[0, 0, 0], [1, 1, 1], [1, 0, 1], [1, 0, 1]]
GROUP, DIM, SCALE = 2, 32, 32**-0.5


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_equals_one_step_for_each_token(
    filled: Callable[..., HeadPages], tokens: int, backend: str
) -> None:
    """Over page borders; a padding row among the requests; heads that other ranks serve."""
    held = [[n * o for n, o in zip(*row, strict=True)] for row in zip(LENS, OWNED, strict=True)]
    pages = filled(held, DIM, owned=OWNED)
    decode = pages.kernels.decode if backend == "cpu" else torch_decode.decode
    make = torch.Generator().manual_seed(3)
    rows = torch.tensor([3, 0, 1, 2])
    k, v = torch.randn((2, tokens, len(rows), 3, DIM), generator=make)
    q = torch.randn((tokens, len(rows), 3 * GROUP, DIM), generator=make)
    slots = torch.empty((len(rows), 3), dtype=torch.int64)
    wanted = torch.empty_like(q)
    for t in range(tokens):
        pages.kernels.grow(pages, rows, slots)
        pages.kernels.append(pages, slots, k[t], v[t])
        decode(pages, q[t], rows, 0, 3, SCALE, wanted[t])
    lens = pages.lens.clone()

    drafts = with_drafts(pages, rows, tokens)
    of_requests = q.transpose(0, 1).reshape(-1, 3 * GROUP, DIM)
    out = torch.full_like(of_requests, torch.nan)
    decode(drafts, of_requests, torch.arange(len(rows) * tokens), 0, 3, SCALE, out)
    assert torch.equal(out.view(len(rows), tokens, 3 * GROUP, DIM).transpose(0, 1), wanted)
    assert torch.equal(pages.lens, lens) and drafts.k_pages is pages.k_pages
    assert torch.equal(out.view(len(rows), tokens, 3 * GROUP, DIM)[1], torch.zeros_like(q[:, 1]))

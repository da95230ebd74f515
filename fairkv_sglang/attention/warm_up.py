# SPDX-License-Identifier: Apache-2.0
"""Compiles what a rank is going to run, before its first request.

Everything is run once on the rank's own pages and with its own decoder, for the padding row: it
owns no lane, so nothing changes. Kernels of another decoder or device are not compiled.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from fairkv_sglang.attention.decoders import Decoder
from fairkv_sglang.budgets import PromptTensors, Rope, Scorer, pick
from fairkv_sglang.budgets.repeats import PassPart
from fairkv_sglang.budgets.selection import pooled_counts
from fairkv_sglang.kernels import PADDING_ROW, HeadPages
from fairkv_sglang.kernels.prompts import PromptBatch

logger = logging.getLogger(__name__)

SCORED = 8


def warm_up(
    pages: HeadPages,
    decoder: Decoder,
    scorer: Scorer,
    lane_start: Sequence[int],
    group: int,
    rope: Rope | None = None,
) -> float:
    """Run every operation of serving once; returns and logs the seconds it took.

    Args:
        pages: Head pages, no row in use.
        decoder: What serves decode.
        scorer: What scores prompts.
        lane_start: [L + 1] first lane of each layer.
        group: Query heads per KV head.
        rope: The model's rotary embedding, if the scorer needs it.
    """
    start = time.perf_counter()
    kernels, device, dim = pages.kernels, pages.device, pages.head_dim
    rows = torch.full((2,), PADDING_ROW, dtype=torch.int64, device=device)
    slots = torch.empty((2, pages.lanes), dtype=torch.int64, device=device)
    kernels.release(pages, rows)
    kernels.grow(pages, rows, slots)
    decoder.plan(rows)
    lanes, layer = max((b - a, -i) for i, (a, b) in enumerate(itertools.pairwise(lane_start)))
    first = lane_start[-layer]
    fused = torch.zeros((2, lanes * (group + 2), dim), dtype=pages.dtype, device=device)
    q, k, v = fused.split([lanes * group, lanes, lanes], dim=1)
    q = decoder.append(slots[:, first : first + lanes], k, v, q)
    decoder.decode(
        q, rows, -layer, lanes, dim**-0.5, torch.empty(q.shape, dtype=q.dtype, device=device)
    )
    _prompt(pages, scorer, lanes, group, rope)
    pages.check_integrity()
    seconds = time.perf_counter() - start
    logger.info(
        "FairKV kernels ready on %s in %.1f s (%s, head dimension %d, group %d)",
        device, seconds, pages.dtype, dim, group,
    )  # fmt: skip
    return seconds


def _prompt(pages: HeadPages, scorer: Scorer, lanes: int, group: int, rope: Rope | None) -> None:
    """A prompt of a few tokens more than the window, in the padding row."""
    device, window = pages.device, scorer.window
    total = window + scorer.sink + SCORED
    scored = total - window
    k = torch.zeros((total, lanes, pages.head_dim), dtype=pages.dtype, device=device)
    q = k[:, :, None].expand(-1, -1, group, -1).contiguous()
    of_prompts, scale = pages.kernels.prompts, pages.head_dim**-0.5
    slots = torch.arange(total, dtype=torch.int32, device=device).expand(pages.rows, -1)
    batch = PromptBatch.create([PADDING_ROW], [total], [scored], slots, [2], [1])
    if of_prompts is not None and scorer.batched:
        last = q[None, -window:] if scorer.needs_queries else None
        scores = scorer.score_all(last, k, batch, scale=scale)
    else:
        part = PromptTensors(q, k, scale, v=k, heads=range(lanes), rope=rope)
        seen = scorer.observe(None, part) if scorer.observes else None
        if scorer.reads_hidden:
            seen = torch.zeros((lanes, total), dtype=torch.float32, device=device)
        if scorer.repeats:
            seen = scorer.attend(None, PassPart(q[scored:], k, 0, scored, scale, ends=True)).most
        scores = scorer.score_prompt(replace(part, q=q[-window:], seen=seen))
    if of_prompts is None:
        pick(scores, window + pooled_counts(scores, SCORED, range(lanes)), total)
        return
    counts = of_prompts.shared_counts(scores, batch, lanes)
    indices = of_prompts.pick(scores, counts, batch, total)
    columns = torch.arange(lanes, device=device)[None]
    of_prompts.store_all_kept(pages, batch.rows, 0, k, k, slots, indices, counts, columns)

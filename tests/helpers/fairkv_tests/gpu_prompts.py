# SPDX-License-Identifier: Apache-2.0
"""Times of what happens to a prompt at its end: compression, and hand-over through a collective.

`clock.device` is "cuda" or "cpu". UNTESTED ON A GPU: the tests run it on the CPU with a clock that
does not measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from fairkv_sglang.attention.compress_all import make_compressor
from fairkv_sglang.attention.endings import Choice, Ending, LayerRows
from fairkv_sglang.attention.forward_spans import ForwardSpans, PromptSpan
from fairkv_sglang.attention.hand_over import HandOver
from fairkv_sglang.bench.gpu.report import NotRun, need
from fairkv_sglang.budgets import AS_SERVER, BudgetSpec, Kept, make_scope
from fairkv_sglang.budgets.scorers.snapkv import SnapKV
from fairkv_sglang.kernels import PAGE_TOKENS, HeadPages
from fairkv_sglang.parallel import RankHeads
from fairkv_sglang.placement import Plan
from fairkv_tests import reference
from fairkv_tests.gpu_hand_over import patched
from fairkv_tests.gpu_steps import without_waiting

if TYPE_CHECKING:
    from fairkv_sglang.bench.clocks import Clock

HEADS, GROUP, CHUNK = 8, 4, 8192


def compressed(
    clock: Clock, tokens: int, layers: int = 4, dim: int = 128, ratio: float = 0.25
) -> dict[str, float]:
    """Compression of a prompt of so many tokens, scope layer, SnapKV, on one rank.

    Returns:
        Per layer, with what is copied to the device before the first one: microseconds on the
        device, and of the host until it is done; most MiB beside what was there (0 on CPU).

    Raises:
        RuntimeError: if the host waits for the device, or other counts than the budget are kept.
    """
    device, scorer = clock.device, SnapKV()
    own = RankHeads(Plan.from_shares(np.ones((layers, 1, HEADS)), "one rank"), 0, GROUP)
    scope = make_scope("layer", BudgetSpec(ratio=ratio), layers, HEADS, scorer)
    kept = min(scope.budget(tokens), tokens)
    sizes = (layers * (HEADS * -(-kept // PAGE_TOKENS) + HEADS), 2, layers * HEADS)
    pages = HeadPages.create(*sizes, -(-tokens // PAGE_TOKENS), dim, torch.bfloat16, device)
    noted: list[Any] = []
    book: Any = SimpleNamespace(
        heads=own, scope=scope, pages=pages, note_kept=lambda row, counts: noted.append(counts),
        owners=lambda row: np.zeros((layers, HEADS), dtype=np.int16), tails=lambda row: {},
        keep=lambda row: AS_SERVER,
    )  # fmt: skip
    compressor = make_compressor(book, scorer, HandOver(own, pages, None))
    make = torch.Generator(device).manual_seed(0)
    pool = torch.randn((2, tokens, HEADS, dim), generator=make, device=device).bfloat16()
    last = min(CHUNK, tokens)  # tokens of the last chunk
    q = torch.randn((last, HEADS, GROUP, dim), generator=make, device=device).bfloat16()
    slots = torch.randperm(tokens, generator=make, device=device).int().expand(2, -1)
    spans = ForwardSpans((PromptSpan(1, 0, last, tokens, tokens),))
    owned = torch.ones(layers * HEADS, dtype=torch.uint8, device=device)
    free = pages.free_count.clone()

    def work() -> None:
        pages.lens.zero_()  # these two in place of a release
        pages.free_count.copy_(free)
        pages.owned[1].copy_(owned)
        compressor.begin(spans, slots)
        for layer in range(layers):
            compressor.layer(layer, q, *pool, spans, dim**-0.5)

    work()  # compiles
    on_gpu = device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with without_waiting(device):
        work()
    most = torch.cuda.max_memory_allocated() if on_gpu else 0
    us, host_us = clock.ms(work, capture=False) * 1e3, clock.host_us(work)
    pages.check_integrity()
    total = pages.lens[1].view(layers, HEADS).sum(1).tolist()
    need(total == [HEADS * kept] * layers, f"kept {total} tokens, not {HEADS * kept}")
    need(bool((noted[-1].view(-1) == pages.lens[1].cpu()).all()), "other counts on the host")
    return {
        "us": us / layers, "host_us": host_us / layers, "most_mib": (most - before) / 2**20
    }  # fmt: skip


@contextmanager
def group_of_one(device: str) -> Iterator[str]:
    """`torch.distributed` with one rank, NCCL or on CPU gloo; gives the backend's name."""
    if device == "cuda" and not dist.is_nccl_available():
        raise NotRun("torch is built without NCCL")
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield backend
    finally:
        dist.destroy_process_group()


class Mirror:
    """`torch.distributed` for one rank of several: what it sends comes back as if from others."""

    def all_to_all_single(
        self, out: Any, mine: Any, out_splits: Any, in_splits: Any, group: Any, async_op: bool
    ) -> Any:
        return dist.all_to_all_single(
            out, mine, [sum(out_splits)], [sum(in_splits)], async_op=async_op
        )


def one_layer(clock: Clock, tokens: int = 8192, kept: int = 2048, dim: int = 128) -> dict[str, Any]:
    """Rank 0 of 4 packs, exchanges and stores a layer whose 8 heads all move to the next rank.

    The collective is a real one over a group of this rank alone.
    """
    device, ranks = clock.device, 4
    scope = make_scope("layer", BudgetSpec(tokens=kept), 1, HEADS, SnapKV())
    owners = (np.arange(HEADS) * ranks // HEADS + 1)[None] % ranks
    shares = (owners == np.arange(ranks)[:, None])[None]
    own = RankHeads(Plan.from_shares(shares.astype(float), "next rank"), 0, GROUP)
    n, most = len(own.home), -(-kept // PAGE_TOKENS)
    pages = HeadPages.create(n * most, 2, n, most, dim, torch.bfloat16, device)
    pages.kernels.set_owned(pages, 1, torch.ones(n, dtype=torch.uint8, device=device))
    pools = torch.randn((2, tokens, n, dim), device=device).bfloat16()
    span = PromptSpan(1, 0, tokens, tokens, tokens)
    sources = own.homes.source[np.arange(HEADS), owners]
    ending = Ending(span, torch.randperm(tokens).to(device), owners, sources, scope)
    counts, free = torch.full((HEADS,), kept, device=device), pages.free_count.clone()
    indices = torch.full((n, int(scope.per_head_bound(tokens)[0].max())), -1)
    indices[:, :kept] = torch.rand((n, tokens)).argsort()[:, :kept].sort().values
    indices = indices.to(device)
    stored, result = n * kept, dict[str, Any]()
    with group_of_one(device), patched(Mirror()):
        for name, exact in (("known", np.full(HEADS, kept)), ("bounded", None)):
            over = HandOver(own, pages, 0)  # type: ignore[arg-type]
            over.overlaps = True  # on the CPU, too
            choice = Choice(Kept(counts[:n], indices), counts, exact)

            def work(over: HandOver = over, choice: Choice = choice) -> None:
                pages.lens.zero_()  # these two in place of a release
                pages.free_count.copy_(free)
                over.start([LayerRows(0, [ending], [choice], *pools)])
                over.finish()

            work()
            rows = over.rows_sent
            us, host_us = clock.ms(work, capture=False) * 1e3, clock.host_us(work)
            pages.check_integrity()
            for lane in range(n):  # the mirror gives back the rank's own heads
                got = torch.stack(reference.gather(pages, 1, lane))
                want = pools[:, ending.slots[indices[lane, :kept]], lane]
                need(torch.equal(got, want), f"{name}: other rows than kept in lane {lane}")
            speed = 2 * (rows + stored) * over.row_bytes / us / 1e3  # read and written
            figures = {"us": us, "gb_per_s": speed, "host_us": host_us}
            result[name] = {**figures, "sent_per_kept": rows / stored}
    return result

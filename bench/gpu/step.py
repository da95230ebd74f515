# SPDX-License-Identifier: Apache-2.0
"""FairKV's part of a whole decode step, captured: what it costs, and what of it is fixed.

Slots of the new tokens, plan, and append and attention of every layer in one graph, as serving
replays it; the model's own layers are left out. UNTESTED ON A GPU: the tests run it with a clock
that does not measure.
"""

from __future__ import annotations

from typing import Any

import torch

from fairkv_sglang.bench.clocks import Clock
from fairkv_sglang.bench.gpu.report import need
from fairkv_sglang.bench.resident import lengths, resident
from fairkv_sglang.kernels import PAGE_TOKENS, HeadPages
from fairkv_sglang.kernels.pages import describe_error

SHAPES = {
    "8B on one GPU: 32 layers of 8 heads, group 4": (32, 8, 4),
    "70B at TP 8: 80 layers of 1 head, group 8": (80, 1, 8),
}
BATCHES = (1, 12, 72, 256)
"""Sizes that SGLang captures."""
BORDERS = (256, 384, 512)


def healthy(pages: HeadPages) -> None:
    """Raise RuntimeError if a kernel has noted an error since the pages were made."""
    bits = int(pages.error)
    need(not bits, f"a device kernel reported: {describe_error(bits)}")


class Step:
    """A decode step of one rank on random head pages.

    Args:
        batch: Requests of the largest batch.
        mean: Kept tokens of a (request, lane), log-normal.
        options: Those of `FlashInferDecoder`.
    """

    def __init__(
        self,
        device: str,
        layers: int,
        heads: int,
        group: int,
        batch: int,
        mean: int = 1024,
        dim: int = 128,
        **options: Any,
    ) -> None:
        from fairkv_sglang.kernels.cuda.flashinfer import FlashInferDecoder

        lanes, scale = layers * heads, dim**-0.5
        lens = lengths("lognormal", batch * lanes, mean).view(batch, lanes)
        dtype = torch.bfloat16
        self.pages = pages = resident(lens, dim, dtype, device, scattered=True, by_columns=False)
        starts = list(range(0, lanes + 1, heads))
        self.decoder = FlashInferDecoder(pages, starts, group, **options)
        self.layers, self.heads, self.scale = layers, heads, scale
        self.start = pages.lens.clone(), pages.free_count.clone()
        self.row_bytes = 2 * dim * dtype.itemsize
        fused = torch.randn((batch, heads * (group + 2), dim), device=device).to(dtype)
        self.q, self.k, self.v = fused.split([heads * group, heads, heads], dim=1)
        self.slots = torch.empty((batch, lanes), dtype=torch.int64, device=device)

    def restore(self, tokens: int | None = None) -> None:
        """As at the beginning, or with so many tokens in each lane; a lane has a page to spare, so
        no more than 16 steps may follow.
        """
        healthy(self.pages)
        self.pages.lens.copy_(self.start[0])
        if tokens is not None:
            self.pages.lens[1:] = tokens
        self.pages.free_count.copy_(self.start[1])

    def grow(self, rows: torch.Tensor) -> None:
        """Slots of the new tokens."""
        self.pages.kernels.grow(self.pages, rows, self.slots[: len(rows)])

    def run(self, rows: torch.Tensor) -> None:
        """All of it, for request rows int64 [bs]."""
        self.grow(rows)
        self.decoder.plan(rows)
        bs, heads = len(rows), self.heads
        for layer in range(self.layers):
            slots = self.slots[:bs, layer * heads : (layer + 1) * heads]
            q = self.decoder.append(slots, self.k[:bs], self.v[:bs], self.q[:bs])
            self.decoder.decode(q, rows, layer, heads, self.scale, torch.empty_like(q))

    def figures(self, clock: Clock, bs: int) -> dict[str, float]:
        """Times of a batch, in microseconds: slots, plan, the step with one token in each lane
        (`empty`: what is fixed), the step, and the same launched without a graph, until it is done.
        """
        rows = torch.arange(1, bs + 1, device=self.pages.device)
        nbytes = int(self.start[0][1 : bs + 1].sum()) * self.row_bytes
        self.restore()
        grow = clock.ms(lambda: self.grow(rows))
        plan = clock.ms(lambda: self.decoder.plan(rows))
        self.restore(1)
        empty = clock.ms(lambda: self.run(rows))
        self.restore()
        step = clock.ms(lambda: self.run(rows))
        self.restore()
        host = clock.host_us(lambda: self.run(rows))
        self.restore()
        return {
            "grow_us": grow * 1e3, "plan_us": plan * 1e3, "empty_us": empty * 1e3,
            "step_us": step * 1e3, "gb_per_s": nbytes / step / 1e6, "host_us": host,
        }  # fmt: skip


def whole_step(
    clock: Clock,
    layers: int,
    heads: int,
    group: int,
    batches: tuple[int, ...] = BATCHES,
    **options: Any,
) -> dict[int, dict[str, float]]:
    """Figures of every batch size, by size; arguments as `Step` has them."""
    step = Step(clock.device, layers, heads, group, max(batches), **options)
    found = {bs: step.figures(clock, bs) for bs in batches}
    step.pages.check_integrity()
    return found


def borders(clock: Clock, bs: int, lanes: int = 640, calls: int = 15) -> dict[str, float]:
    """Microseconds of `grow` for so many requests: all lanes cross a page border at once in one of
    16 steps, or a sixteenth of them in each.

    `calls`: runs of 16 steps that the arena has pages for.
    """
    pages = HeadPages.create(
        bs * lanes * (calls + 1), bs + 1, lanes, calls + 1, 8, torch.bfloat16, clock.device, False
    )
    rows = torch.arange(1, bs + 1, device=clock.device)
    slots = torch.empty((bs, lanes), dtype=torch.int64, device=clock.device)
    steps = torch.zeros(1, dtype=torch.int64, device=clock.device)
    ahead = torch.arange(bs * lanes, device=clock.device).view(bs, lanes) % PAGE_TOKENS

    def sixteen() -> None:
        for _ in range(PAGE_TOKENS):
            pages.kernels.grow(pages, rows, slots)
        steps.add_(PAGE_TOKENS)

    found = {}
    for name in ("at once", "spread"):
        pages.kernels.release(pages, rows)
        steps.zero_()
        held = ahead if name == "spread" else ahead * 0
        for number in range(int(held.max())):
            pages.owned[1:] = held > number
            pages.kernels.grow(pages, rows, slots)
        pages.owned[1:] = 1
        found[name] = clock.ms(sixteen) * 1e3 / PAGE_TOKENS
        pages.check_integrity()
        need(torch.equal(pages.lens[1:].long(), held + steps), f"{name}: lengths")
    return found

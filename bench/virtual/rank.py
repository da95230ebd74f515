# SPDX-License-Identifier: Apache-2.0
"""One rank's share of one layer on a device.

On CUDA a part is captured in a graph and replayed between two events (UNTESTED ON A GPU). On CPU a
rank is one core: torch runs with one thread and the processor time of that thread counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairkv_sglang.bench.clocks import Clock, CpuClock, CudaClock
from fairkv_sglang.bench.resident import resident
from fairkv_sglang.kernels.pages import PAGE_TOKENS, HeadPages
from fairkv_sglang.model import Model
from fairkv_sglang.placement import Plan

WEIGHT_COPIES = 3
"""Matrices that take turns at least, so that no repetition finds its weights in a cache."""
MOST_COPIES = 256
REPLAYS = 10
Owners = NDArray[np.int16]


@dataclass
class Device:
    """Where virtual ranks run; keeps arena and weights between them.

    Attributes:
        decode: ``auto`` is what the engine takes there: FlashInfer, or numba on CPU.
        cache_bytes: What takes turns is as large as this: four times a GPU's L2 cache. 0: a share's
            pages are large beside the caches of one core.
    """

    name: str
    dtype: torch.dtype
    decode: str = "auto"
    repeats: int = 5
    arena: HeadPages | None = None
    cache_bytes: int = 0
    _weights: dict[tuple[int, int, int], list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choices = ("flashinfer", "triton") if self.on_cuda else ("numba",)
        self.decode = choices[0] if self.decode == "auto" else self.decode
        if self.decode not in choices:
            raise ValueError(f"--decode {self.decode} does not run on {self.name}: auto, {choices}")
        if self.on_cuda:
            self.cache_bytes = 4 * torch.cuda.get_device_properties(self.name).L2_cache_size

    @property
    def on_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.name.startswith("cuda")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One thread on CPU; the former number afterwards."""
        before = torch.get_num_threads()
        torch.set_num_threads(before if self.on_cuda else 1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def random(self, *shape: int) -> Tensor:
        """Numbers of ordinary size."""
        return torch.randn(shape, device=self.name, dtype=torch.float32).to(self.dtype)

    def copies(self, nbytes: int, least: int = 1) -> int:
        """How many of something of that size take turns, so that none is found in a cache."""
        return max(least, min(MOST_COPIES, -(-self.cache_bytes // nbytes)))

    def linear(self, rows: int, columns: int, copies: int = WEIGHT_COPIES) -> Callable[..., Tensor]:
        """``f(x, i)``: product with the i-th of some matrices of a shape, made once."""
        key = rows, columns, copies
        found = self._weights.get(key)
        if found is None:
            one = self.random(rows, columns) * columns**-0.5
            found = [one, *(one.clone() for _ in range(copies - 1))]
            self._weights[key] = found
        return lambda x, i: torch.nn.functional.linear(x, found[i % len(found)])

    def pages(self, lengths: NDArray[np.int64], head_dim: int) -> HeadPages:
        """Head pages of ``lengths [batch, n]`` in rows 1.., scattered over the arena.

        0 tokens mean that the rank does not serve the head for the request.
        """
        lens = torch.from_numpy(lengths)
        pages = resident(lens, head_dim, self.dtype, self.name, scattered=True, arena=self.arena)
        pages.owned[1:] = lens > 0
        if self.arena is None or self.arena.k_pages.data_ptr() != pages.k_pages.data_ptr():
            self.arena = pages
        return pages

    def clock(self, repeats: int) -> Clock:
        """Times on this device."""
        return CudaClock(repeats, REPLAYS) if self.on_cuda else CpuClock(repeats)

    def seconds(self, part: Callable[[int], object], copies: int = WEIGHT_COPIES) -> float:
        """Median time of ``part(i)``; i counts the repetitions, of which ``copies`` differ."""
        clock, number = self.clock(self.repeats), itertools.count()
        if not self.on_cuda:
            return clock.ms(lambda: part(next(number))) * 1e-3
        every = range(copies)  # all in one graph
        return clock.ms(lambda: [part(i) for i in every]) * 1e-3 / copies


def share_seconds(device: Device, model: Model, lengths: NDArray[np.int64]) -> tuple[float, float]:
    """What one rank does in the attention part of one layer: projections and append; decode.

    Args:
        device: Where.
        model: The model.
        lengths: ``[batch, n]`` kept tokens of the rank's heads; 0 where another rank serves them.
    """
    (batch, n), group, width = lengths.shape, model.group_size, model.head_dim
    x, new = device.random(batch, model.hidden_size), device.random(batch, 2 * n, width)
    columns = n * (2 * group + 2) * width  # of qkv and of o
    copies = device.copies(columns * model.hidden_size * device.dtype.itemsize, WEIGHT_COPIES)
    qkv = device.linear(n * (group + 2) * width, model.hidden_size, copies)
    o = device.linear(model.hidden_size, n * group * width, copies)
    sets = device.copies(max(1, 2 * int(lengths.sum()) * width * device.dtype.itemsize))
    pages = device.pages(np.tile(lengths, sets), width)
    rows, q = torch.arange(1, batch + 1, device=device.name), device.random(batch, n * group, width)
    out, slots = torch.zeros_like(q), _last_slots(pages, rows)[:, :n]

    def weights(i: int) -> None:
        qkv(x, i)
        pages.kernels.append(pages, slots, new[:, :n], new[:, n:])
        o(out.view(batch, -1), i)

    decode = decoder(device, pages, rows, q, out, group, sets)
    return device.seconds(weights, copies), device.seconds(decode, sets)


def decoder(
    device: Device,
    pages: HeadPages,
    rows: Tensor,
    q: Tensor,
    out: Tensor,
    group: int,
    sets: int = 1,
) -> Callable[[int], object]:
    """Decode attention of one layer as the engine runs it; ``sets`` of lanes take turns."""
    heads, scale = pages.lanes // sets, pages.head_dim**-0.5
    if device.decode == "flashinfer":
        from fairkv_sglang.kernels.cuda.flashinfer import FlashInferDecoder

        kernel = FlashInferDecoder(pages, range(0, pages.lanes + 1, heads), group)
        kernel.plan(rows)
        return lambda i: kernel.decode(q, rows, i % sets, heads, scale, out)
    return lambda i: pages.kernels.decode(pages, q, rows, i % sets * heads, heads, scale, out)


def _last_slots(pages: HeadPages, rows: Tensor) -> Tensor:
    """``int64 [batch, n]``: arena slot of the newest token of each lane, -1 where not served."""
    last = (pages.lens[rows].long() - 1).clamp(min=0)
    lanes = torch.arange(pages.lanes, device=rows.device)
    page = pages.page(rows[:, None], lanes, last // PAGE_TOKENS).long()
    slots = page * PAGE_TOKENS + last % PAGE_TOKENS
    return slots.masked_fill(pages.lens[rows] == 0, -1).contiguous()


def upkeep_seconds(
    device: Device, model: Model, plan: Plan, tokens: NDArray[np.int64], owners: Owners
) -> float:
    """Table upkeep of a step over all layers (``Kernels.grow``), and FlashInfer's plan, on the rank
    with the most lanes.
    """
    rank = max(range(plan.tp_size), key=lambda r: int(plan.lane_start(r)[-1]))
    served = [(layer, head) for layer in range(plan.num_layers) for head in plan.heads(layer, rank)]
    layers, heads = (np.array(part) for part in zip(*served, strict=True))
    lengths = np.where(owners[:, layers, heads] == rank, tokens[layers, heads], 0)
    # Bookkeeping alone: keys and values may be short.
    pages = resident(torch.from_numpy(lengths), 8, device.dtype, device.name)
    pages.owned[1:] = pages.lens[1:] > 0
    rows = torch.arange(1, len(owners) + 1, device=device.name)
    slots = torch.empty(lengths.shape, dtype=torch.int64, device=device.name)
    # A lane has one spare page, so there must not be more steps than tokens in it. They advance
    # lengths and cannot be replayed.
    clock = device.clock(min(device.repeats, PAGE_TOKENS // 2))
    spent = clock.ms(lambda: pages.kernels.grow(pages, rows, slots), capture=False) * 1e-3
    if device.decode == "flashinfer":
        from fairkv_sglang.kernels.cuda.flashinfer import FlashInferDecoder

        start: list[Any] = [int(x) for x in plan.lane_start(rank)]
        kernel = FlashInferDecoder(pages, start, model.group_size, module="plans alone")
        spent += device.seconds(lambda i: kernel.plan(rows))
    return spent

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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fairkv_sglang.bench.clocks import Clock, CpuClock, CudaClock
from fairkv_sglang.bench.sizes import ModelSizes
from fairkv_sglang.kernels import ops
from fairkv_sglang.kernels.pages import PAGE_TOKENS, HeadPages
from fairkv_sglang.kernels.workload import resident
from fairkv_sglang.placement import Plan

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_COPIES = 3
"""Matrices that take turns, so that no repetition finds its weights in a cache."""
REPLAYS = 10


@dataclass
class Device:
    """Where virtual ranks run; keeps arena and weights between them."""

    name: str
    dtype: torch.dtype
    decode: str
    arena: HeadPages | None = None
    _weights: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    @classmethod
    def create(cls, name: str, dtype: str, decode: str = "auto") -> Device:
        """A device by torch's name.

        Raises:
            ValueError: for a dtype or decoder that does not exist there.
        """
        kind = getattr(torch, dtype, None)
        if kind not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"--dtype {dtype}: one of float32, bfloat16, float16")
        on_cuda = name.startswith("cuda")
        choices = ("flashinfer", "triton") if on_cuda else ("numba",)
        chosen = choices[0] if decode == "auto" else decode
        if chosen not in choices:
            raise ValueError(f"--decode {decode} does not run on {name}: auto, {choices}")
        return cls(name, kind, chosen)

    @property
    def on_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.name.startswith("cuda")

    @property
    def dtype_bytes(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def describe(self) -> dict[str, Any]:
        """For the result."""
        name = torch.cuda.get_device_name(0) if self.on_cuda else "one core of the CPU"
        clock = "CUDA events around graph replays" if self.on_cuda else "processor time"
        return {"name": name, "decode": self.decode, "dtype": str(self.dtype), "clock": clock}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One thread on CPU; the former number afterwards."""
        before = torch.get_num_threads()
        if not self.on_cuda:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def random(self, *shape: int) -> Tensor:
        """Numbers of ordinary size."""
        return torch.randn(shape, device=self.name, dtype=torch.float32).to(self.dtype)

    def weights(self, rows: int, columns: int, copies: int = WEIGHT_COPIES) -> list[Tensor]:
        """Matrices of a shape, made once."""
        found = self._weights.get((rows, columns))
        if found is None:
            one = self.random(rows, columns) * columns**-0.5
            found = [one, *(one.clone() for _ in range(copies - 1))]
            self._weights[rows, columns] = found
        return found

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

    def seconds(self, part: Callable[[int], object], repeats: int) -> float:
        """Median time of ``part(i)``; i counts the repetitions."""
        clock, number = self.clock(repeats), itertools.count()
        if not self.on_cuda:
            return clock.ms(lambda: part(next(number))) * 1e-3
        every = range(WEIGHT_COPIES)  # all in one graph
        return clock.ms(lambda: [part(i) for i in every]) * 1e-3 / WEIGHT_COPIES


class LayerShare:
    """What one rank does in the attention part of one layer.

    Args:
        device: Where.
        sizes: The model.
        lengths: ``[batch, n]`` kept tokens of the rank's heads; 0 where another rank serves them.
    """

    def __init__(self, device: Device, sizes: ModelSizes, lengths: NDArray[np.int64]) -> None:
        self.device, self.sizes, self.lengths = device, sizes, lengths
        self.batch, self.heads = lengths.shape

    def seconds(self, repeats: int) -> tuple[float, float]:
        """Projections and append; decode attention."""
        device, sizes, n, group = self.device, self.sizes, self.heads, self.sizes.group
        width = sizes.head_dim
        linear = torch.nn.functional.linear
        x = device.random(self.batch, sizes.hidden)
        qkv = device.weights(n * (group + 2) * width, sizes.hidden)
        out = device.weights(sizes.hidden, n * group * width)
        pages = device.pages(self.lengths, width)
        rows = torch.arange(1, self.batch + 1, device=device.name)
        q = device.random(self.batch, n * group, width)
        result = torch.empty_like(q)
        new = device.random(self.batch, 2 * n, width)
        slots = _last_slots(pages, rows)

        def weights(i: int) -> None:
            linear(x, qkv[i % len(qkv)])
            ops.append(pages, slots, new[:, :n], new[:, n:])
            linear(result.view(self.batch, -1), out[i % len(out)])

        decode = self._decoder(pages, rows, q, result)
        return device.seconds(weights, repeats), device.seconds(decode, repeats)

    def _decoder(
        self, pages: HeadPages, rows: Tensor, q: Tensor, result: Tensor
    ) -> Callable[[int], object]:
        scale = self.sizes.head_dim**-0.5
        if self.device.decode == "flashinfer":
            from fairkv_sglang.kernels.flashinfer_decode import FlashInferDecode

            kernel = FlashInferDecode(pages, self.batch, [0, self.heads], self.sizes.group, scale)
            kernel.plan(rows)
            return lambda i: kernel.run(0, q, result)
        return lambda i: ops.decode(pages, q, rows, 0, self.heads, scale, result)


def _last_slots(pages: HeadPages, rows: Tensor) -> Tensor:
    """``int64 [batch, n]``: arena slot of the newest token of each lane, -1 where not served."""
    last = (pages.lens[rows].long() - 1).clamp(min=0)
    page = pages.page_table[rows].long().gather(2, (last // PAGE_TOKENS)[..., None])[..., 0]
    slots = page * PAGE_TOKENS + last % PAGE_TOKENS
    return slots.masked_fill(pages.lens[rows] == 0, -1).contiguous()


def upkeep_seconds(
    device: Device,
    plan: Plan,
    rank: int,
    tokens: NDArray[np.int64],
    owners: NDArray[np.int16],
    repeats: int,
) -> float:
    """Table upkeep of a step over all layers (``ops.grow``), and FlashInfer's plan."""
    batch = len(owners)
    served = [(layer, head) for layer in range(plan.num_layers) for head in plan.heads(layer, rank)]
    layers, heads = (np.array(part) for part in zip(*served, strict=True))
    lengths = np.where(owners[:, layers, heads] == rank, tokens[layers, heads], 0)
    # Bookkeeping alone: keys and values may be short.
    pages = resident(torch.from_numpy(lengths), 8, device.dtype, device.name)
    pages.owned[1:] = pages.lens[1:] > 0
    rows = torch.arange(1, batch + 1, device=device.name)
    slots = torch.empty((batch, lengths.shape[1]), dtype=torch.int64, device=device.name)
    # A lane has one spare page, so there must not be more steps than tokens in it. They advance
    # lengths and cannot be replayed.
    clock = device.clock(min(repeats, PAGE_TOKENS // 2))
    spent = clock.ms(lambda: ops.grow(pages, rows, slots), capture=False) * 1e-3
    if device.decode == "flashinfer":
        from fairkv_sglang.kernels.flashinfer_decode import FlashInferDecode

        start = [int(x) for x in plan.lane_start(rank)]
        kernel = FlashInferDecode(pages, batch, start, 4, 0.125, module="plans alone")
        spent += device.seconds(lambda i: kernel.plan(rows), repeats)
    return spent

# SPDX-License-Identifier: Apache-2.0
"""One rank's share of one layer on a device, and the clock that times it.

On CUDA a part is captured in a graph and replayed between two events (UNTESTED ON A GPU). On CPU a
rank is one core: torch runs with one thread and the processor time of that thread counts, so that
other work on the machine is not measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fairkv_sglang.bench.sizes import ModelSizes
from fairkv_sglang.kernels import ops
from fairkv_sglang.kernels.pages import PAGE_TOKENS, HeadPages, key_shape
from fairkv_sglang.placement import Plan

if TYPE_CHECKING:
    from torch import Tensor

DECODERS = ("auto", "numba", "triton", "flashinfer")
WEIGHT_COPIES = 3
"""Matrices that take turns, so that no repetition finds its weights in a cache."""
REPLAYS = 10


@dataclass
class Device:
    """Where virtual ranks run; keeps arena and weights between them."""

    name: str
    dtype: torch.dtype
    decode: str
    arenas: tuple[Tensor, Tensor] | None = None
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
        batch, heads = lengths.shape
        counts = -(-lengths // PAGE_TOKENS)
        total = max(int(counts.sum()), 1)
        if (
            self.arenas is None
            or len(self.arenas[0]) < total
            or self.arenas[1].shape[2] != head_dim
        ):
            self.arenas = None
            keys, values = self._shapes(total, head_dim)
            self.arenas = (self.random(*keys), self.random(*values))
        table = np.zeros((batch + 1, heads, max(int(counts.max()), 1)), dtype=np.int32)
        order = np.random.default_rng(0).permutation(total).astype(np.int32)
        column = np.arange(table.shape[2])
        table[1:][column < counts[..., None]] = order[: int(counts.sum())]
        return self._state(table, lengths, *self.arenas, free=0)

    def tables(self, lengths: NDArray[np.int64], head_dim: int) -> HeadPages:
        """The same without KV memory, with a free page for every lane: for bookkeeping alone."""
        counts = -(-lengths // PAGE_TOKENS)
        total, spare = int(counts.sum()), lengths.size
        table = np.zeros(
            (lengths.shape[0] + 1, lengths.shape[1], int(counts.max()) + 2), dtype=np.int32
        )
        column = np.arange(table.shape[2])
        table[1:][column < counts[..., None]] = np.arange(total, dtype=np.int32)
        nothing = torch.zeros((), dtype=self.dtype, device=self.name)
        keys, values = (nothing.expand(s) for s in self._shapes(total + spare, head_dim))
        return self._state(table, lengths, keys, values, free=spare)

    def _shapes(self, pages: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the arenas of keys and values."""
        keys = key_shape(pages, head_dim, self.dtype, by_columns=not self.on_cuda)
        return keys, (pages, PAGE_TOKENS, head_dim)

    def _state(
        self,
        table: NDArray[np.int32],
        lengths: NDArray[np.int64],
        k_pages: Tensor,
        v_pages: Tensor,
        free: int,
    ) -> HeadPages:
        lens = np.concatenate([np.zeros_like(lengths[:1]), lengths]).astype(np.int32)
        pages = len(k_pages)

        def put(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(self.name)

        return HeadPages(
            k_pages=k_pages,
            v_pages=v_pages,
            page_table=put(table),
            lens=put(lens),
            owned=put((lens > 0).astype(np.uint8)),
            free_pages=torch.arange(pages - 1, -1, -1, dtype=torch.int32, device=self.name),
            free_count=torch.tensor([free], dtype=torch.int64, device=self.name),
            error=torch.zeros(1, dtype=torch.int32, device=self.name),
        )

    def seconds(self, part: Callable[[int], object], repeats: int) -> float:
        """Median time of ``part(i)``; i counts the repetitions."""
        return self._cuda(part, repeats) if self.on_cuda else _cpu(part, repeats)

    def _cuda(self, part: Callable[[int], object], repeats: int) -> float:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(WEIGHT_COPIES):
                part(i)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(WEIGHT_COPIES):
                part(i)
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3 / (REPLAYS * WEIGHT_COPIES))
        return float(np.median(times))


def _cpu(part: Callable[[int], object], repeats: int) -> float:
    part(0)
    times = []
    for i in range(repeats):
        started = time.thread_time()
        part(i + 1)
        times.append(time.thread_time() - started)
    return float(np.median(times))


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
    pages = device.tables(lengths, 64)
    rows = torch.arange(1, batch + 1, device=device.name)
    slots = torch.empty((batch, lengths.shape[1]), dtype=torch.int64, device=device.name)
    # A lane has one spare page, so there must not be more steps than tokens in it.
    repeats = min(repeats, PAGE_TOKENS // 2)
    if device.on_cuda:
        # grow advances lengths, so replays would run out of pages; its time is one plain launch.
        spent = _plain_cuda(lambda: ops.grow(pages, rows, slots), repeats)
    else:
        spent = _cpu(lambda i: ops.grow(pages, rows, slots), repeats)
    if device.decode == "flashinfer":
        from fairkv_sglang.kernels.flashinfer_decode import FlashInferDecode

        start = [int(x) for x in plan.lane_start(rank)]
        kernel = FlashInferDecode(pages, batch, start, 4, 0.125)
        spent += device.seconds(lambda i: kernel.plan(rows), repeats)
    return spent


def _plain_cuda(part: Callable[[], object], repeats: int) -> float:
    part()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        part()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return float(np.median(times))

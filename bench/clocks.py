# SPDX-License-Identifier: Apache-2.0
"""What times a piece of work: CUDA events around graph replays, or the processor time of a thread.

The CUDA clock is UNTESTED ON A GPU: the tests put a clock that does not measure in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Protocol

import torch

Work = Callable[[], object]

PAUSE = 20_000_000
"""Cycles, about 10 ms: longer than the launches of what is timed without a graph."""


class Clock(Protocol):
    """What measures."""

    device: str

    def ms(self, work: Work, capture: bool = True) -> float:
        """Milliseconds of `work` on the device; what cannot be replayed is not captured."""

    def host_us(self, work: Work) -> float:
        """Microseconds until `work` is done, seen from the host."""


def captured(work: Work, device: str) -> Work:
    """`work` once for compilation, then as a CUDA graph; on CPU `work` itself."""
    if device == "cpu":
        work()
        return work
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class CudaClock:
    """Medians of CUDA events around `replays` of a graph, and of the host's clock."""

    device = "cuda"

    def __init__(self, rounds: int = 10, replays: int = 1) -> None:
        self.rounds, self.replays = rounds, replays

    def ms(self, work: Work, capture: bool = True) -> float:
        call = captured(work, self.device) if capture else work
        call()
        times, replays = [], self.replays if capture else 1
        for _ in range(self.rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if not capture:  # queued behind a pause, so that launches do not count
                torch.cuda._sleep(PAUSE)
            start.record()
            for _ in range(replays):
                call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / replays)
        return median(times)

    def host_us(self, work: Work) -> float:
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return median(times[1:]) * 1e6  # the first may compile


class CpuClock:
    """Median processor time of this thread: what else the machine does is not measured."""

    device = "cpu"

    def __init__(self, rounds: int = 10) -> None:
        self.rounds = rounds

    def ms(self, work: Work, capture: bool = True) -> float:
        work()
        times = []
        for _ in range(self.rounds):
            start = time.thread_time()
            work()
            times.append(time.thread_time() - start)
        return median(times) * 1e3

    def host_us(self, work: Work) -> float:
        return self.ms(work) * 1e3

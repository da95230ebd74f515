# SPDX-License-Identifier: Apache-2.0
"""``torch.distributed`` for ranks that are threads; a group is (rank, number of ranks)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import ModuleType
from typing import Any
from unittest import mock

import torch

Group = tuple[int, int]
TIMEOUT = 30


class Work:
    """An exchange under way: what it brings is there after ``wait`` and not before."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish
        self.waited = 0

    def wait(self) -> None:
        self.waited += 1
        self._finish()


class Collectives:
    """Carries what the ranks give, and holds them to the rules of the real ones.

    All ranks must call the same collectives in the same order with sizes that fit. Data given to an
    asynchronous one must stay as it is until ``wait``.
    """

    def __init__(self, ranks: int) -> None:
        self.calls: list[list[str]] = [[] for _ in range(ranks)]
        self.bytes_sent = [0] * ranks  # to other ranks
        self.works: list[Work] = []
        self.broken = False
        self._boxes: dict[int, dict[int, tuple[str, Any]]] = {}
        self._changed = threading.Condition()

    def count(self, name: str) -> int:
        """Calls of the collective ``name``, the same on every rank."""
        assert all(calls == self.calls[0] for calls in self.calls), self.calls
        return self.calls[0].count(name)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """``work(rank)`` on all ranks at the same time; the first failure is raised."""

        def guarded(rank: int) -> Any:
            try:
                return work(rank)
            except BaseException:
                with self._changed:
                    self.broken = True
                    self._changed.notify_all()
                raise

        with ThreadPoolExecutor(len(self.calls)) as pool:
            tasks = [pool.submit(guarded, rank) for rank in range(len(self.calls))]
        errors = [error for task in tasks if (error := task.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        assert not errors
        assert all(work.waited == 1 for work in self.works), "an exchange that nobody waits for"
        self.count("")
        return [task.result() for task in tasks]

    def _post(self, group: Group, name: str, payload: Any) -> int:
        rank = group[0]
        assert group[1] == len(self.calls)
        with self._changed:
            number = len(self.calls[rank])
            self.calls[rank].append(name)
            self._boxes.setdefault(number, {})[rank] = (name, payload)
            self._changed.notify_all()
        return number

    def _collect(self, number: int) -> list[Any]:
        box, ranks = self._boxes[number], len(self.calls)
        with self._changed:
            ready = self._changed.wait_for(lambda: self.broken or len(box) == ranks, TIMEOUT)
        if not ready or len(box) < ranks:
            raise threading.BrokenBarrierError(f"call {number}: only ranks {sorted(box)} came")
        names = {name for name, _ in box.values()}
        assert len(names) == 1, f"ranks call different collectives: {names}"
        return [box[rank][1] for rank in range(ranks)]

    def all_gather_into_tensor(self, out: torch.Tensor, mine: torch.Tensor, group: Group) -> None:
        assert out.shape == (group[1] * mine.shape[0], *mine.shape[1:])
        assert out.is_contiguous() and mine.is_contiguous() and out.dtype == mine.dtype
        parts = self._collect(self._post(group, "all_gather", mine.clone()))
        assert len({part.shape for part in parts}) == 1
        self.bytes_sent[group[0]] += mine.nbytes
        out.copy_(torch.cat(parts))

    def all_to_all_single(
        self,
        out: torch.Tensor,
        mine: torch.Tensor,
        out_splits: Sequence[int],
        in_splits: Sequence[int],
        group: Group,
        async_op: bool = False,
    ) -> Work | None:
        rank, ranks = group
        assert len(out_splits) == len(in_splits) == ranks
        assert out.numel() == sum(out_splits) and mine.numel() == sum(in_splits)
        assert out.is_contiguous() and mine.is_contiguous() and out.dtype == mine.dtype
        assert all(type(size) is int for size in [*out_splits, *in_splits])
        before = mine.clone()
        self.bytes_sent[rank] += mine.element_size() * (sum(in_splits) - in_splits[rank])
        if out.dtype == torch.uint8:
            out.fill_(0xFF)  # NaN to whoever reads too early
        number = self._post(group, "all_to_all", (before, list(in_splits)))

        def finish() -> None:
            assert torch.equal(mine, before), "what is sent changed under way"
            pieces = []
            for other, (data, splits) in enumerate(self._collect(number)):
                assert splits[rank] == out_splits[other], (other, rank, splits, out_splits)
                pieces.append(data.split(splits)[rank])
            out.copy_(torch.cat(pieces))

        work = Work(finish)
        if async_op:
            self.works.append(work)
            return work
        work.wait()
        return None


def ranks_as_threads(ranks: int, modules: Sequence[ModuleType], work: Callable[..., Any]) -> Any:
    """``work(rank, group)`` on every rank, with collectives in place of ``dist`` in ``modules``.

    Returns:
        The results of the ranks, and the collectives with their counters.
    """
    collectives = Collectives(ranks)
    groups: list[Group | None] = [(rank, ranks) if ranks > 1 else None for rank in range(ranks)]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "dist", collectives))
        return collectives.run(lambda rank: work(rank, groups[rank])), collectives

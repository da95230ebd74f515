# SPDX-License-Identifier: Apache-2.0
"""``torch.distributed`` for ranks that are threads; a group is (rank, number of ranks)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from fairkv_tests.gpu_hand_over import Group, Ranks

__all__ = ["Collectives", "Group", "ranks_as_threads"]


class Work:
    """An exchange under way: what it brings is there after ``wait`` and not before."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish
        self.waited = 0

    def wait(self) -> None:
        self.waited += 1
        self._finish()


class Collectives(Ranks):
    """Holds the ranks to the rules of the real collectives, and counts.

    All ranks must call the same collectives in the same order with sizes that fit. Data given to an
    asynchronous one must stay as it is until ``wait``.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__(ranks)
        self.bytes_sent = [0] * ranks  # to other ranks
        self.works: list[Work] = []

    def count(self, name: str) -> int:
        """Calls of the collective ``name``, the same on every rank."""
        assert all(calls == self.calls[0] for calls in self.calls), self.calls
        return self.calls[0].count(name)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """``work(rank)`` on all ranks; the first failure is raised."""
        results = super().run(work)
        assert all(work.waited == 1 for work in self.works), "an exchange that nobody waits for"
        self.count("")
        return results

    def all_gather_into_tensor(self, out: torch.Tensor, mine: torch.Tensor, group: Group) -> None:
        assert group[1] == len(self.calls)
        assert out.shape == (group[1] * mine.shape[0], *mine.shape[1:])
        assert out.is_contiguous() and mine.is_contiguous() and out.dtype == mine.dtype
        self.bytes_sent[group[0]] += mine.nbytes
        super().all_gather_into_tensor(out, mine.clone(), group)

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
        assert len(out_splits) == len(in_splits) == ranks == len(self.calls)
        assert out.numel() == sum(out_splits) and mine.numel() == sum(in_splits)
        assert out.is_contiguous() and mine.is_contiguous() and out.dtype == mine.dtype
        assert all(type(size) is int for size in [*out_splits, *in_splits])
        before = mine.clone()
        self.bytes_sent[rank] += mine.element_size() * (sum(in_splits) - in_splits[rank])
        if out.dtype == torch.uint8:
            out.fill_(0xFF)  # NaN to whoever reads too early
        under_way = super().all_to_all_single(out, before, out_splits, in_splits, group, True)

        def finish() -> None:
            assert torch.equal(mine, before), "what is sent changed under way"
            under_way.wait()

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

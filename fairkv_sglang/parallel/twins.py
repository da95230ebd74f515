# SPDX-License-Identifier: Apache-2.0
"""Decode twins: beside each attention module of SGLang one with the weights of this rank's lanes.

SGLang's module stays as it is and runs prompts. Its twin is a copy of it with the counts of this
rank's lanes and projections of its own (``projections.py``). Twins are filled from the homes'
loaded weights over the process group, not from the checkpoint: any way of loading works, an update
of weights refreshes them, and a change of plan needs no disk.

Where a rank's lanes of a layer are its home heads, the twin is SGLang's module itself.

Where plans change while serving, every layer has a store for all its slots. What decode multiplies
with is the part of it up to the last slot in use, so that empty slots cost nothing; under CUDA
graphs, whose shapes stay, it is always the whole store.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fairkv_sglang.parallel import projections
from fairkv_sglang.parallel.heads import RankHeads
from fairkv_sglang.parallel.lanes import EMPTY, Move
from fairkv_sglang.parallel.projections import from_bytes, num_bytes, to_bytes, views

logger = logging.getLogger(__name__)

TWIN = "fairkv_twin"
"""Attribute of SGLang's attention module: its decode twin, which may be the module itself."""

_PROJECTIONS = ("qkv_proj", "o_proj")


class TwinWeights:
    """The twins of all layers of one rank.

    Args:
        modules: SGLang's attention modules by layer.
        heads: This rank's heads.
        head_dim: D.
        group: Process group of the ranks; None at TP 1.
        fixed_width: Whether decode always runs over all slots (CUDA graphs).
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        heads: RankHeads,
        head_dim: int,
        group: dist.ProcessGroup | None,
        *,
        fixed_width: bool = False,
    ) -> None:
        self.modules = list(modules)
        self.heads = heads
        self.head_dim = head_dim
        self.group = group
        self.fixed_width = fixed_width and not heads.table.fixed
        self.bytes = 0
        self.bytes_brought = 0  # by new plans
        # By layer: the twin for each width, all over the same memory, and the width it is laid out
        # for.
        self._twins: list[dict[int, nn.Module]] = [{} for _ in self.modules]
        self._width = [0] * len(self.modules)

    def build(self) -> None:
        """Make the twins and fill them. All ranks call this at the same time.

        Raises:
            RuntimeError: if SGLang built other heads than its own split says, or holds weights that
                cannot be cut along heads.
        """
        for layer, module in enumerate(self.modules):
            if not (self.heads.table.fixed and self.heads.serves_home(layer)):
                capacity = len(self.heads.slots(layer))
                self._check(layer, module)
                twin = self._make(layer, capacity)
                self._twins[layer][capacity] = twin
                self._width[layer] = capacity
                self.bytes += sum(
                    weight.numel() * weight.element_size()
                    for name in _PROJECTIONS
                    for weight in getattr(twin, name).parameters()
                )
            self._choose(layer)
        self.refresh()

    def refresh(self) -> None:
        """Fill the twins from the homes' weights again. All ranks call this at the same time."""
        ranks = range(self.heads.homes.tp_size)
        for layer in range(len(self.modules)):
            rows = self.heads.table.head[layer].tolist()
            self._fill(
                layer,
                [
                    []
                    if self.heads.table.fixed and self.heads.serves_home(layer, rank)
                    else [head for head in rows[rank] if head != EMPTY]
                    for rank in ranks
                ],
            )

    def bring(self, moves: Sequence[Move]) -> None:
        """Weights of heads that got a slot. All ranks call this with the same moves."""
        for layer in sorted({move.layer for move in moves}):
            self._choose(layer)
            needed: list[list[int]] = [[] for _ in range(self.heads.homes.tp_size)]
            for move in moves:
                if move.layer == layer:
                    needed[move.rank].append(move.head)
            self._fill(layer, needed)
            self.bytes_brought += len(needed[self.heads.rank]) * self.lane_bytes

    @torch.no_grad()
    def shift(self, layer: int, source: int, target: int) -> None:
        """The head of slot ``source`` is in slot ``target`` from now on; see ``close_gap``."""
        twin = self._twins[layer][self._width[layer]]
        rows = self.heads.group_size * self.head_dim
        weights = to_bytes(views(twin, source, source * rows, rows))
        from_bytes(weights, views(twin, target, target * rows, rows))
        self._choose(layer)

    def settle(self) -> None:
        """Slots were emptied: narrower twins, or SGLang's modules again where they will do."""
        for layer in range(len(self.modules)):
            self._choose(layer)

    @property
    def lane_bytes(self) -> int:
        """Bytes of the weights of one lane."""
        module: Any = self.modules[0]
        width = module.q_size // len(self.heads.home)
        return num_bytes(views(module, 0, 0, width)) * self.heads.homes.replicas

    def describe(self) -> str:
        """One line for the start-up log."""
        layers = sum(1 for twins in self._twins if twins)
        slots = "" if self.heads.table.fixed else f" ({self.heads.num_lanes} lane slots)"
        return (
            f"decode twins of rank {self.heads.rank}: {self.bytes / (1 << 20):.1f} MiB of weights "
            f"in {layers} of {len(self.modules)} layers{slots}"
        )

    def _choose(self, layer: int) -> None:
        """Let decode run on the module that holds the slots in use."""
        module = self.modules[layer]
        twin = module
        if self._twins[layer]:
            width = self.heads.table.width(layer, self.heads.rank)
            if self.fixed_width:
                width = len(self.heads.slots(layer))
            self._lay_out(layer, width)  # also where it is not used: it takes what comes next
            if self.fixed_width or not self.heads.serves_home(layer):
                twin = self._twins[layer][width]
        # Not a submodule: SGLang's loading, updating and listing of weights must not see it.
        object.__setattr__(module, TWIN, twin)

    @torch.no_grad()
    def _lay_out(self, layer: int, width: int) -> None:
        """Arrange the store for ``width`` slots; all of them keep what they hold."""
        before = self._width[layer]
        if width == before:
            return
        twins = self._twins[layer]
        if width not in twins:
            twins[width] = self._make(layer, width, twins[len(self.heads.slots(layer))])
        rows = self.heads.group_size * self.head_dim
        shared = range(min(width, before))
        held = [to_bytes(views(twins[before], slot, slot * rows, rows)) for slot in shared]
        for slot, weights in zip(shared, held, strict=True):
            from_bytes(weights, views(twins[width], slot, slot * rows, rows))
        self._width[layer] = width

    def _make(self, layer: int, width: int, memory: nn.Module | None = None) -> nn.Module:
        """A twin with ``width`` slots, in the memory of one with more if there is one."""
        twin = projections.with_heads(self.modules[layer], width, self.heads.group_size, memory)
        twin.__dict__.pop(TWIN, None)
        return twin

    def _check(self, layer: int, module: Any) -> None:
        homes, group_size = self.heads.homes, self.heads.group_size
        q_heads = homes.per_rank * group_size // homes.replicas
        expected = (homes.per_rank, q_heads, self.head_dim)
        found = (module.attn.tp_k_head_num, module.attn.tp_q_head_num, module.head_dim)
        if found != expected:
            raise RuntimeError(
                f"FairKV: layer {layer} was built with (KV heads, query heads, head size) {found}, "
                f"expected {expected}"
            )
        projections.check(module, module.q_size // homes.per_rank)

    @torch.no_grad()
    def _fill(self, layer: int, needed: Sequence[Sequence[int]]) -> None:
        """One exchange: every home sends its part of each head to the ranks that need it.

        Args:
            needed: Heads that each rank needs for slots that it has given them.
        """
        if not any(needed):
            return
        module: Any = self.modules[layer]
        homes, rank = self.heads.homes, self.heads.rank
        # Every home of a head has other query heads of it, so all of them send.
        sent = [[h for h in row if rank in homes.ranks(h)] for row in needed]
        got = [[h for h in needed[rank] if other in homes.ranks(h)] for other in range(len(needed))]
        width = module.q_size // len(self.heads.home)  # query rows of a head here
        columns = [self.heads.home.index(h) for row in sent for h in row]
        parts = [to_bytes(views(module, c, c * width, width)) for c in columns]
        size = num_bytes(views(module, 0, 0, width))
        device = next(module.qkv_proj.parameters()).device
        send = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)
        inbox = send
        if self.group is not None:
            inbox = send.new_empty(size * sum(map(len, got)))
            dist.all_to_all_single(
                inbox,
                send,
                [len(row) * size for row in got],
                [len(row) * size for row in sent],
                group=self.group,
            )
        if not needed[rank]:
            return
        twin = self._twins[layer][self._width[layer]]
        done = [0] * homes.num_kv_heads  # parts of each head; they come in the order of its homes
        for head, part in zip((h for row in got for h in row), inbox.split(size), strict=True):
            lane = self.heads.table.slot(layer, rank, head)
            first = lane * width * homes.replicas + done[head] * width
            from_bytes(part, views(twin, lane, first, width))
            done[head] += 1
        projections.copy_shared(module, twin)

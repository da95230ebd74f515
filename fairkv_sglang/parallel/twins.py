# SPDX-License-Identifier: Apache-2.0
"""Decode twins: beside each attention module of SGLang one with the weights of this rank's lanes.

SGLang's module stays as it is and runs prompts. Its twin is the same class, built with the counts
of this rank's lanes: SGLang's attention modules divide the model's head counts by the
tensor-parallel size, so the counts ``n * tp_size`` make ``n`` heads for any ``n``. Twins are filled
from the homes' loaded weights over the process group, not from the checkpoint: any way of loading
works, an update of weights refreshes them, and a change of plan needs no disk.

Where a rank's lanes of a layer are its home heads, the twin is SGLang's module itself.

Where plans change while serving, every layer has a store for all its slots. What decode multiplies
with is the part of it up to the last slot in use, so that empty slots cost nothing; under CUDA
graphs, whose shapes stay, it is always the whole store.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairkv_sglang.parallel.heads import RankHeads
from fairkv_sglang.parallel.lanes import EMPTY, Move

logger = logging.getLogger(__name__)

ARGUMENTS = "fairkv_arguments"
"""Attribute of an attention module: the keyword arguments that it was built with."""
TWIN = "fairkv_twin"
"""Attribute of SGLang's attention module: its decode twin, which may be the module itself."""

_PLACED = ("qkv_proj", "o_proj", "attn")  # children that a twin has for itself; it shares the rest


class TwinWeights:
    """The twins of all layers of one rank.

    Args:
        modules: SGLang's attention modules by layer, with :data:`ARGUMENTS`.
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
            RuntimeError: if SGLang built other heads than the plan or its own split says.
        """
        for layer, module in enumerate(self.modules):
            if not (self.heads.table.fixed and self.heads.serves_home(layer)):
                capacity = len(self.heads.slots(layer))
                twin = self._make(layer, module, capacity)
                self._twins[layer][capacity] = twin
                self._width[layer] = capacity
                self.bytes += sum(
                    weight.numel() * weight.element_size()
                    for name in ("qkv_proj", "o_proj")
                    for weight in _zeroed(getattr(twin, name).parameters())
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
        weights = _flat(_views(twin, source, source * rows, rows))
        _unflatten(weights, _views(twin, target, target * rows, rows))
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
        views = _views(module, 0, 0, width)
        return sum(v.numel() * v.element_size() for v in views) * self.heads.homes.replicas

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
            twins[width] = self._narrow(layer, width)
        rows = self.heads.group_size * self.head_dim
        shared = range(min(width, before))
        held = [_flat(_views(twins[before], slot, slot * rows, rows)) for slot in shared]
        for slot, weights in zip(shared, held, strict=True):
            _unflatten(weights, _views(twins[width], slot, slot * rows, rows))
        self._width[layer] = width

    def _narrow(self, layer: int, width: int) -> nn.Module:
        """A twin of ``width`` slots over the memory of the one with all slots."""
        full: Any = self._twins[layer][len(self.heads.slots(layer))]
        module = self.modules[layer]
        twin: Any = self._construct(module, width, torch.device("meta"))
        for name in ("qkv_proj", "o_proj"):
            own, whole = getattr(twin, name), getattr(full, name)
            for key, parameter in list(own.named_parameters()):
                memory = getattr(whole, key).data
                view = memory.view(-1)[: parameter.numel()].view(parameter.shape)
                setattr(own, key, nn.Parameter(view, requires_grad=False))
        return self._share(twin, module)

    def _make(self, layer: int, module: nn.Module, count: int) -> nn.Module:
        homes, group_size = self.heads.homes, self.heads.group_size
        self._check(module, homes.per_rank, homes.per_rank * group_size // homes.replicas, layer)
        qkv: Any = module.qkv_proj
        twin = self._construct(module, count, qkv.weight.device)
        self._check(twin, count, count * group_size, layer)
        return self._share(twin, module)

    def _construct(self, module: Any, count: int, device: torch.device) -> nn.Module:
        """A module like SGLang's with ``count`` KV heads; new weights, of the same type."""
        tp_size = self.heads.plan.tp_size
        arguments = {
            **getattr(module, ARGUMENTS),
            "num_heads": count * self.heads.group_size * tp_size,
            "num_kv_heads": count * tp_size,
        }
        return _built_like(module.qkv_proj.weight, device, lambda: type(module)(**arguments))

    @staticmethod
    def _share(twin: nn.Module, module: nn.Module) -> nn.Module:
        for name, child in module.named_children():
            if name not in _PLACED:
                setattr(twin, name, child)
        return twin.eval()

    def _check(self, module: Any, kv_heads: int, q_heads: int, layer: int) -> None:
        expected = (kv_heads, q_heads, self.head_dim)
        found = (module.attn.tp_k_head_num, module.attn.tp_q_head_num, module.head_dim)
        if found != expected:
            raise RuntimeError(
                f"FairKV: layer {layer} was built with (KV heads, query heads, head size) {found}, "
                f"expected {expected}"
            )

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
        parts = [_flat(_views(module, c, c * width, width)) for c in columns]
        size = sum(view.numel() for view in _views(module, 0, 0, width))
        weight = module.qkv_proj.weight
        send = torch.cat(parts) if parts else weight.new_empty(0)
        inbox = send
        if self.group is not None:
            inbox = weight.new_empty(size * sum(map(len, got)))
            bytes_each = size * weight.element_size()
            dist.all_to_all_single(
                inbox.view(torch.uint8),
                send.view(torch.uint8),
                [len(row) * bytes_each for row in got],
                [len(row) * bytes_each for row in sent],
                group=self.group,
            )
        if not needed[rank]:
            return
        twin = self._twins[layer][self._width[layer]]
        done = [0] * homes.num_kv_heads  # parts of each head; they come in the order of its homes
        for head, part in zip((h for row in got for h in row), inbox.split(size), strict=True):
            lane = self.heads.table.slot(layer, rank, head)
            first = lane * width * homes.replicas + done[head] * width
            _unflatten(part, _views(twin, lane, first, width))
            done[head] += 1
        if getattr(module.o_proj, "bias", None) is not None:
            twin_out: Any = twin.o_proj
            twin_out.bias.copy_(module.o_proj.bias)


def _views(module: Any, column: int, first: int, width: int) -> list[Tensor]:
    """What one head has in a module: q, k, v rows, o columns, and biases if there are any.

    Args:
        column: The head's place among the module's KV heads.
        first: First of its query rows.
        width: Number of its query rows.
    """
    dim, q_size, kv_size = module.head_dim, module.q_size, module.kv_size
    starts = ((first, width), (q_size + column * dim, dim), (q_size + kv_size + column * dim, dim))
    rows = [slice(start, start + size) for start, size in starts]
    qkv, out = module.qkv_proj, module.o_proj
    views = [*(qkv.weight[row] for row in rows), out.weight[:, rows[0]]]
    if qkv.bias is not None:
        views += [qkv.bias[row] for row in rows]
    return views


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _built_like(weight: Tensor, device: torch.device, build: Callable[[], nn.Module]) -> nn.Module:
    """A module on ``device`` whose new weights have the type of ``weight``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        with device:
            return build()
    finally:
        torch.set_default_dtype(before)


def _unflatten(flat: Tensor, views: list[Tensor]) -> None:
    """Copy what :func:`_flat` made into views of the same sizes."""
    for view, piece in zip(views, flat.split([view.numel() for view in views]), strict=True):
        view.copy_(piece.view(view.shape))


def _zeroed(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    """Unused memory could hold NaN, which would reach others through products with zero."""
    for parameter in parameters:
        yield parameter.data.zero_()

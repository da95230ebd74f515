# SPDX-License-Identifier: Apache-2.0
"""Decode twins: beside each attention module of SGLang one with the weights of this rank's lanes.

SGLang's module stays as it is and runs prompts. Its twin is the same class, built with the counts
of this rank's lanes: SGLang's attention modules divide the model's head counts by the
tensor-parallel size, so the counts ``n * tp_size`` make ``n`` heads for any ``n``. Twins are filled
from the homes' loaded weights over the process group, not from the checkpoint: any way of loading
works, an update of weights refreshes them, and a change of plan needs no disk.

Where a rank's lanes of a layer are its home heads, the twin is SGLang's module itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairkv_sglang.parallel.heads import RankHeads

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
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        heads: RankHeads,
        head_dim: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.modules = list(modules)
        self.heads = heads
        self.head_dim = head_dim
        self.group = group
        self.bytes = 0

    def build(self) -> None:
        """Make the twins and fill them. All ranks call this at the same time.

        Raises:
            RuntimeError: if SGLang built other heads than the plan or its own split says.
        """
        for layer, module in enumerate(self.modules):
            twin = module if self.heads.serves_home(layer) else self._make(layer, module)
            # Not a submodule: SGLang's loading, updating and listing of weights must not see it.
            object.__setattr__(module, TWIN, twin)
        self.refresh()
        weights = [
            weight for twin in self._made() for name in ("qkv_proj", "o_proj")
            for weight in getattr(twin, name).parameters()
        ]  # fmt: skip
        self.bytes = sum(weight.numel() * weight.element_size() for weight in weights)

    def refresh(self) -> None:
        """Fill the twins from the homes' weights again. All ranks call this at the same time."""
        for layer, module in enumerate(self.modules):
            self._fill(layer, module)

    def describe(self) -> str:
        """One line for the start-up log."""
        layers = sum(1 for _ in self._made())
        return (
            f"decode twins of rank {self.heads.rank}: {self.bytes / (1 << 20):.1f} MiB of weights "
            f"in {layers} of {len(self.modules)} layers; in the others its lanes are its home heads"
        )

    def _made(self) -> Iterator[nn.Module]:
        for module in self.modules:
            if getattr(module, TWIN) is not module:
                yield getattr(module, TWIN)

    def _make(self, layer: int, module: nn.Module) -> nn.Module:
        homes, group_size = self.heads.homes, self.heads.group_size
        self._check(module, homes.per_rank, homes.per_rank * group_size // homes.replicas, layer)
        count = len(self.heads.heads[layer])
        tp_size = self.heads.plan.tp_size
        arguments = {
            **getattr(module, ARGUMENTS),
            "num_heads": count * group_size * tp_size,
            "num_kv_heads": count * tp_size,
        }
        qkv: Any = module.qkv_proj
        twin = _built_like(qkv.weight, lambda: type(module)(**arguments))
        self._check(twin, count, count * group_size, layer)
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
    def _fill(self, layer: int, module: Any) -> None:
        """One exchange: every home sends its part of each head to the ranks that serve it."""
        homes, rank = self.heads.homes, self.heads.rank
        ranks = range(homes.tp_size)
        needed = [
            () if self.heads.serves_home(layer, other) else self.heads.plan.heads(layer, other)
            for other in ranks
        ]
        if not any(needed):
            return
        # Every home of a head has other query heads of it, so all of them send.
        sent = [[h for h in row if rank in homes.ranks(h)] for row in needed]
        got = [[h for h in needed[rank] if other in homes.ranks(h)] for other in ranks]
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
        twin = getattr(module, TWIN)
        done = [0] * homes.num_kv_heads  # parts of each head; they come in the order of its homes
        for head, part in zip((h for row in got for h in row), inbox.split(size), strict=True):
            lane = needed[rank].index(head)
            first = lane * width * homes.replicas + done[head] * width
            views = _views(twin, lane, first, width)
            pieces = part.split([view.numel() for view in views])
            for view, piece in zip(views, pieces, strict=True):
                view.copy_(piece.view(view.shape))
            done[head] += 1
        if getattr(module.o_proj, "bias", None) is not None:
            twin.o_proj.bias.copy_(module.o_proj.bias)


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


def _built_like(weight: Tensor, build: Callable[[], nn.Module]) -> nn.Module:
    """A module whose new weights have the type and the device of ``weight``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        with weight.device:
            return build()
    finally:
        torch.set_default_dtype(before)

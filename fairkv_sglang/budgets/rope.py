# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (arXiv 2104.09864), taken back: keys as they were before it.

A cache holds rotated keys. Methods that compare keys whatever their positions are need them as they
were; a rotation can be undone from the table of cosines and sines that the model has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model.

    Attributes:
        table: Gives ``[positions, R]``, R / 2 cosines, then R / 2 sines of each position; asked for
            each time, as the engine may lengthen it. The first R numbers of a head are rotated.
        halves: Number i is rotated with i + R / 2 (Llama, "neox"); False: 2 i with 2 i + 1.
    """

    table: Callable[[], Tensor]
    halves: bool = True

    def undo(self, x: Tensor, first: int = 0) -> Tensor:
        """Keys or queries before their rotation, float32.

        Some models scale cosines and sines; that is taken back, too.

        Args:
            x: ``[T, ..., D]`` of the positions from ``first`` on.
            first: Position of the first row.
        """
        cos, sin = self._rows(first, first + len(x))
        size = cos * cos + sin * sin
        between = [1] * (x.dim() - 2)
        cos, sin = (part.view(len(x), *between, -1) for part in (cos / size, -sin / size))
        return self.turn(x.float(), cos, sin)

    def mean(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Mean cosines and sines ``[R / 2]`` of positions, as far as the model has them."""
        cos, sin = self._rows(first, end)
        return cos.mean(dim=0), sin.mean(dim=0)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[..., D]`` rotated by cosines and sines ``[..., R / 2]``."""
        half = cos.shape[-1]
        part, rest = x[..., : 2 * half], x[..., 2 * half :]
        if self.halves:
            a, b = part[..., :half], part[..., half:]
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = part[..., ::2], part[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def _rows(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        table = self.table()
        first = min(first, len(table) - 1)
        cos, sin = table[first:end].float().chunk(2, dim=-1)
        return cos, sin

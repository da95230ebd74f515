# SPDX-License-Identifier: Apache-2.0
"""The prompts that end in a pass, as device kernels read them: one small table for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

KEYS = 64
"""Keys of a prompt that a program of the scoring kernels looks at."""

ROW, LENGTH, SCORED, COLUMN, BLOCK, BEYOND, FLOOR = range(7)
"""Rows of the table: request row; tokens; tokens that are scored, 0 if all are kept; where the
scores and the blocks of KEYS tokens begin among those of all prompts; budget beyond the window and
floor of a head, for scopes in which heads compete."""


@dataclass(frozen=True)
class PromptBatch:
    """Ending prompts of a pass. Prompts that keep everything have no scores and no blocks.

    Attributes:
        request_rows: Rows of SGLang's request table.
        lengths: Tokens of each prompt.
        scored: Scored tokens of each.
        starts: Where each prompt's scores begin; one more for the end.
        blocks: Blocks of all prompts.
        table: int64 [7, P + 1] on the device; the last column ends COLUMN and BLOCK.
        slots: int [rows, context] SGLang's request table: pool slot of each (row, position).
    """

    request_rows: tuple[int, ...]
    lengths: tuple[int, ...]
    scored: tuple[int, ...]
    starts: tuple[int, ...]
    blocks: int
    table: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def create(
        cls,
        rows: Sequence[int],
        lengths: Sequence[int],
        scored: Sequence[int],
        slots: torch.Tensor,
        beyond: Sequence[int] = (),
        floor: Sequence[int] = (),
    ) -> PromptBatch:
        """One copy to the device, for which nobody waits."""
        count = len(rows)
        table = torch.zeros((7, count + 1), dtype=torch.int64)
        blocks = [-(-n // KEYS) if m else 0 for n, m in zip(lengths, scored, strict=True)]
        for name, values in (
            (ROW, rows), (LENGTH, lengths), (SCORED, scored), (BEYOND, beyond), (FLOOR, floor)
        ):  # fmt: skip
            table[name, : len(values)] = torch.tensor(values, dtype=torch.int64)
        table[COLUMN, 1:] = torch.tensor(scored).cumsum(0)
        table[BLOCK, 1:] = torch.tensor(blocks).cumsum(0)
        starts = tuple(table[COLUMN].tolist())
        on_device = to_device(table, slots.device)
        return cls(
            tuple(rows), tuple(lengths), tuple(scored), starts, sum(blocks), on_device, slots
        )

    @property
    def count(self) -> int:
        """P."""
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Scored tokens of all prompts."""
        return self.starts[-1]

    @property
    def rows(self) -> torch.Tensor:
        """int64 [P] request rows, on the device."""
        return self.table[ROW, : self.count]


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device for which the host does not wait; the tensor itself on CPU.

    A copy from ordinary memory would wait for the stream, so it goes through pinned memory.
    """
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)

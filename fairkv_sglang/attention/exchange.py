# SPDX-License-Identifier: Apache-2.0
"""Collectives of the budget scopes: scores of all heads, kept counts of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fairkv_sglang.placement.homes import Homes


class HomeExchange:
    """All-gathers of what each rank knows of its home heads.

    Args:
        homes: SGLang's split of the heads.
        group: Process group of the ranks.
    """

    def __init__(self, homes: Homes, group: dist.ProcessGroup) -> None:
        self.homes = homes
        self.group = group

    def scores(self, mine: list[Tensor]) -> list[Tensor]:
        """Scores of all heads, so that every rank selects from the same numbers.

        One collective carries them for all layers of a group and all prompts that end in the pass:
        4 bytes per (layer, head, token). A head with several homes is scored by each for its query
        heads; a head's score is the mean over its query heads, so it is the mean of those.

        Args:
            mine: Per layer and prompt ``float32 [home heads, M]``.

        Returns:
            The same ``float32 [H, M]`` in head order, equal on all ranks.
        """
        received = self.table(torch.cat(mine, dim=1))
        return list(received.split([part.shape[1] for part in mine], dim=1))

    def table(self, mine: Tensor) -> Tensor:
        """The same for scores of all prompts side by side: ``[H, M]`` from ``[home heads, M]``."""
        homes, width = self.homes, mine.shape[1]
        received = mine.new_empty((homes.tp_size * homes.per_rank, width))
        if width:
            dist.all_gather_into_tensor(received, mine, group=self.group)
        if homes.replicas > 1:
            received = received.view(homes.num_kv_heads, homes.replicas, width).mean(dim=1)
        return received

    def counts(self, mine: Tensor) -> Tensor:
        """Kept counts ``int64 [..., H]`` of all heads from ``[..., home heads]`` of each rank."""
        homes = self.homes
        send = mine.movedim(-1, 0).contiguous()
        received = send.new_empty((homes.tp_size * homes.per_rank, *send.shape[1:]))
        dist.all_gather_into_tensor(received, send, group=self.group)
        return received[:: homes.replicas].movedim(0, -1).contiguous()

# SPDX-License-Identifier: Apache-2.0
"""Collectives of the budget scopes: scores of all heads of a layer, kept counts of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fairkv_sglang.parallel import RankHeads
from fairkv_sglang.placement import Plan
from fairkv_sglang.runtime import FairKVRuntime


class LayerExchange:
    """All-gather of one layer's scores, so that every rank selects from the same numbers.

    One collective per layer and forward pass carries the scores of all prompts that end in it:
    4 bytes per (head, token). Each head comes from its primary rank, bit for bit the same for all.

    Args:
        plan: Placement of the model.
        heads: This rank's heads.
        group: Process group of the ranks.
    """

    def __init__(self, plan: Plan, heads: RankHeads, group: dist.ProcessGroup) -> None:
        self.heads = heads
        self.group = group
        primary = plan.primary()  # [L, H]
        self._rows: list[int] = []
        self._order: list[Tensor] = []
        for layer in range(plan.num_layers):
            sent = [
                [h for h in plan.heads(layer, rank) if primary[layer, h] == rank]
                for rank in range(plan.tp_size)
            ]
            rows = max(len(row) for row in sent)
            where = {
                head: rank * rows + j for rank, row in enumerate(sent) for j, head in enumerate(row)
            }
            self._rows.append(rows)
            self._order.append(torch.tensor([where[h] for h in range(plan.num_kv_heads)]))

    def gather(self, layer: int, scores: list[Tensor]) -> list[Tensor]:
        """Scores of all heads.

        Args:
            layer: Layer index.
            scores: Per prompt ``float32 [primary heads of this rank, M]``.

        Returns:
            Per prompt ``float32 [H, M]`` in head order, equal on all ranks.
        """
        widths = [part.shape[1] for part in scores]
        total = sum(widths)
        device = scores[0].device
        send = torch.zeros((self._rows[layer], total), dtype=torch.float32, device=device)
        mine = torch.cat(scores, dim=1)
        send[: mine.shape[0]] = mine
        size = dist.get_world_size(self.group)
        received = torch.empty(
            (size * self._rows[layer], total), dtype=torch.float32, device=device
        )
        if total:
            dist.all_gather_into_tensor(received, send, group=self.group)
        self._order[layer] = self._order[layer].to(device)  # copied once
        everyone = received[self._order[layer]]
        return list(everyone.split(widths, dim=1))


def gather_counts(runtime: FairKVRuntime, counts: list[Tensor], group: dist.ProcessGroup) -> Tensor:
    """``int64 [L, H]`` kept counts of all heads, once per prompt (scope ``rank``).

    Args:
        runtime: This rank.
        counts: Per layer ``[n]`` counts of this rank's lanes; no head is on two ranks.
        group: Process group of the ranks.
    """
    plan, heads = runtime.plan, runtime.heads
    table = torch.zeros(
        (plan.num_layers, plan.num_kv_heads), dtype=torch.int64, device=counts[0].device
    )
    for layer, row in enumerate(counts):
        table[layer, list(heads.heads[layer])] = row
    dist.all_reduce(table, group=group)
    return table

# SPDX-License-Identifier: Apache-2.0
"""Scores that a trained scorer gives to tokens from hidden states, kept beside SGLang's pool.

A token is scored when its K and V are computed and its score lies at their slot as long as they do.
So prompts in chunks, and prompts of which a prefix is cached, have all of their scores when they
end, and nothing is computed for that again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fairkv_sglang.budgets.scorers.base import Gate


class HiddenScores:
    """The scores of a rank's home heads.

    Args:
        gates: Of each layer with a budget, for the n home heads.
        slots: Slots of SGLang's pool.
        heads: n.
        device: Where the pool is.
    """

    def __init__(
        self, gates: Mapping[int, Gate], slots: int, heads: int, device: torch.device
    ) -> None:
        self._gates = dict(gates)
        shape = (len(self._gates), slots, heads)
        table = torch.zeros(shape, dtype=torch.float32, device=device)
        self._tables = dict(zip(self._gates, table, strict=True))

    def add(self, layer: int, hidden: Any, slots: Tensor) -> None:
        """Score tokens whose K and V go to ``slots`` ``[T]`` in this pass.

        Args:
            layer: Layer index.
            hidden: ``[T, hidden]`` input of the layer's attention, behind its norm.
            slots: Slots of SGLang's pool.

        Raises:
            RuntimeError: if SGLang has quantised the hidden states.
        """
        gate = self._gates.get(layer)
        if gate is None:
            return
        if not isinstance(hidden, Tensor):
            raise RuntimeError(
                "FairKV: SGLang's norm quantises this model's hidden states, which the scorer "
                "reads; use another --fairkv-scorer"
            )
        self._tables[layer].index_copy_(0, slots.long(), gate(hidden))

    def of(self, layer: int, slots: Tensor) -> Tensor:
        """float32 ``[n, N]`` of the tokens at ``slots`` ``[N]``."""
        return self._tables[layer].index_select(0, slots).T

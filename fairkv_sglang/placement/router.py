# SPDX-License-Identifier: Apache-2.0
"""The router: which rank serves each head of a request, decided when the request is admitted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fairkv_sglang.placement.plan import Plan

IntArray = NDArray[np.int64]
OwnerArray = NDArray[np.int16]


@dataclass
class _Resident:
    owners: OwnerArray  # [L, H]
    tokens: IntArray  # [L, H]


class Router:
    """Chooses owners so that what the ranks really hold stays even in every layer.

    Every rank runs the same router in lock-step: decisions depend only on the plan and on the
    sequence of calls. Loads are whole tokens, so sums are exact in any order.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._loads: IntArray = np.zeros((plan.num_layers, plan.tp_size), dtype=np.int64)
        self._residents: dict[int, _Resident] = {}
        self._primary = plan.primary()
        self._copied = [
            [(head, ranks) for head, ranks in enumerate(layer) if len(ranks) > 1]
            for layer in plan.copies()
        ]

    def admit(self, key: int, expected: ArrayLike) -> OwnerArray:
        """Owners ``[L, H]`` int16 of request ``key`` with ``expected [L, H]`` kept tokens.

        Raises ValueError if the key is admitted already or the shape is wrong.
        """
        if key in self._residents:
            raise ValueError(f"request {key} is admitted already; release it first")
        tokens = self._tokens(expected)
        owners = self._primary.copy()
        for layer, copied in enumerate(self._copied):
            if not copied:
                continue
            load = self._loads[layer].copy()
            fixed = np.ones(self._plan.num_kv_heads, dtype=bool)
            fixed[[head for head, _ in copied]] = False
            np.add.at(load, owners[layer, fixed], tokens[layer, fixed])
            for head, ranks in sorted(copied, key=lambda item: (-tokens[layer, item[0]], item[0])):
                rank = min(ranks, key=lambda r: (load[r], r))
                owners[layer, head] = rank
                load[rank] += tokens[layer, head]
        self._residents[key] = _Resident(owners, tokens)
        self._add(owners, tokens, 1)
        return owners.copy()

    def update(self, key: int, kept: ArrayLike) -> None:
        """Replace the expected by the exact kept tokens ``[L, H]``; owners stay."""
        resident = self._resident(key)
        tokens = self._tokens(kept)
        self._add(resident.owners, tokens - resident.tokens, 1)
        resident.tokens = tokens

    def release(self, key: int) -> None:
        """Forget a request that has left."""
        resident = self._resident(key)
        self._add(resident.owners, resident.tokens, -1)
        del self._residents[key]

    def loads(self) -> IntArray:
        """Resident tokens ``[L, R]``."""
        return self._loads.copy()

    def _add(self, owners: OwnerArray, tokens: IntArray, sign: int) -> None:
        rows = np.broadcast_to(np.arange(self._plan.num_layers)[:, None], owners.shape)
        np.add.at(self._loads, (rows, owners), sign * tokens)

    def _resident(self, key: int) -> _Resident:
        if key not in self._residents:
            raise ValueError(f"request {key} is not admitted")
        return self._residents[key]

    def _tokens(self, values: ArrayLike) -> IntArray:
        array = np.asarray(values, dtype=np.float64)
        shape = (self._plan.num_layers, self._plan.num_kv_heads)
        if array.shape != shape:
            raise ValueError(f"tokens must have the shape {shape}, got {array.shape}")
        if not np.isfinite(array).all() or (array < 0).any():
            raise ValueError("tokens must be finite and >= 0")
        return np.rint(array).astype(np.int64)

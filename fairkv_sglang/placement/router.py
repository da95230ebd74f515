# SPDX-License-Identifier: Apache-2.0
"""The router: which rank serves each head of a request, decided when the request is admitted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fairkv_sglang.placement.homes import home_table
from fairkv_sglang.placement.plan import Plan

IntArray = NDArray[np.int64]
OwnerArray = NDArray[np.int16]

_SWEEPS = 2
_FAR = np.iinfo(np.int64).max // 4


@dataclass
class _Resident:
    owners: OwnerArray  # [L, H]
    tokens: IntArray  # [L, H]


class Router:
    """Chooses owners so that what the ranks really hold stays even in every layer.

    A new request's copied heads are placed together, layer by layer: largest first on the emptiest
    rank that serves the head, then each head is taken up again while another rank is emptier.
    What counts is the load that the residents really have (``update``), plus, for a plan made
    with a cost model, the rank's weight slices in tokens.

    Every rank runs the same router in lock-step: decisions depend only on the plan and on the
    sequence of calls. Loads are whole tokens, so sums are exact in any order. Ties between ranks
    go to the head's home, which has its rows already (``homes.py``), else to the lower rank, and
    ties between heads to the lower head. Lanes may change while requests are served.
    """

    def __init__(self, plan: Plan) -> None:
        self._shape = (plan.num_layers, plan.num_kv_heads)
        self._loads: IntArray = np.zeros((plan.num_layers, plan.tp_size), dtype=np.int64)
        self._residents: dict[int, _Resident] = {}
        self._rows = np.arange(plan.num_layers)
        self.lane_tokens = plan.info.get("lane_tokens", 0)
        if not isinstance(self.lane_tokens, int) or self.lane_tokens < 0:
            raise ValueError(
                f"plan.info['lane_tokens'] must be an integer >= 0, got {self.lane_tokens}"
            )
        self.set_lanes(plan.shares() > 0)

    def set_lanes(self, served: NDArray[np.bool_]) -> None:
        """From now on owners are ranks that ``served [L, R, H]`` names; residents keep theirs.

        Raises ValueError, and changes nothing, if the shape is wrong or a head has no rank.
        """
        shape = (self._shape[0], self._loads.shape[1], self._shape[1])
        served = np.asarray(served, dtype=bool)
        if served.shape != shape:
            raise ValueError(f"lanes must have the shape {shape}, got {served.shape}")
        count = served.sum(axis=1)  # [L, H]
        if not count.all():
            layer, head = np.argwhere(count == 0)[0]
            raise ValueError(f"layer {layer}: head {head} is served by no rank")
        self._primary: IntArray = served.argmax(axis=1).astype(np.int64)
        self._copied = count > 1
        self._steps = int(self._copied.sum(axis=1).max())
        # ranks[l, h]: the ranks that serve the head, homes first and else ascending, then others
        # marked as far away
        home = home_table(shape[2], shape[1])
        away = 2 * ~served.transpose(0, 2, 1) + ~home.T  # [L, H, R]
        most = int(count.max())
        self._ranks: IntArray = np.argsort(away, axis=2, kind="stable")[:, :, :most]
        self._far = np.where(np.arange(most) < count[:, :, None], 0, _FAR).astype(np.int64)
        self._base: IntArray = served.sum(axis=2) * self.lane_tokens

    def choose(self, expected: ArrayLike) -> OwnerArray:
        """Owners that a request with ``expected [L, H]`` kept tokens would get now."""
        return self._choose(self._tokens(expected))

    def admit(self, key: int, expected: ArrayLike, owners: OwnerArray | None = None) -> OwnerArray:
        """Owners ``[L, H]`` int16 of request ``key`` with ``expected [L, H]`` kept tokens.

        With ``owners`` those that :meth:`choose` gave. Raises ValueError if the key is admitted
        already or the shape is wrong.
        """
        self._free(key)
        tokens = self._tokens(expected)
        if owners is None:
            owners = self._choose(tokens)
        self._residents[key] = _Resident(owners, tokens)
        self._add(owners, tokens, 1)
        return owners.copy()

    def rename(self, key: int, new: int) -> None:
        """Request ``key`` is called ``new`` from now on."""
        self._free(new)
        self._residents[new] = self._resident(key)
        del self._residents[key]

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

    def _choose(self, tokens: IntArray) -> OwnerArray:
        rows = self._rows
        owners = self._primary.copy()
        load = self._loads + self._base
        fixed = np.where(self._copied, 0, tokens)
        np.add.at(load, (rows[:, None], owners), fixed)
        moving = np.where(self._copied, tokens, 0)
        # copied heads first, largest first, ties by head
        order = np.lexsort((np.where(self._copied, -tokens, 1), ~self._copied), axis=1)
        for sweep in range(1 + _SWEEPS):
            changed = False
            for step in range(self._steps):
                head = order[:, step]
                amount = moving[rows, head]
                old = owners[rows, head]
                if sweep:
                    load[rows, old] -= amount
                ranks = self._ranks[rows, head]
                room = load[rows[:, None], ranks] + self._far[rows, head]
                new = ranks[rows, room.argmin(axis=1)]
                if sweep:  # a move must gain something
                    new = np.where(load[rows, new] < load[rows, old], new, old)
                changed |= bool((new != old).any())
                owners[rows, head] = new
                load[rows, new] += amount
            if not changed:
                break
        return owners.astype(np.int16)

    def _add(self, owners: OwnerArray, tokens: IntArray, sign: int) -> None:
        np.add.at(self._loads, (self._rows[:, None], owners), sign * tokens)

    def _free(self, key: int) -> None:
        if key in self._residents:
            raise ValueError(f"request {key} is admitted already; release it first")

    def _resident(self, key: int) -> _Resident:
        if key not in self._residents:
            raise ValueError(f"request {key} is not admitted")
        return self._residents[key]

    def _tokens(self, values: ArrayLike) -> IntArray:
        array = np.asarray(values, dtype=np.float64)
        if array.shape != self._shape:
            raise ValueError(f"tokens must have the shape {self._shape}, got {array.shape}")
        if not np.isfinite(array).all() or (array < 0).any():
            raise ValueError("tokens must be finite and >= 0")
        return np.rint(array).astype(np.int64)

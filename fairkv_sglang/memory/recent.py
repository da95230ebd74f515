# SPDX-License-Identifier: Apache-2.0
"""The queries of the last output tokens of every row: what compression of outputs goes by.

Written inside of the decode step, at places that follow from the lengths of the requests: shapes
and addresses never change, so a CUDA graph can hold it, and nothing is reset between requests.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairkv_sglang.kernels.prompts import to_device


class RecentQueries:
    """A ring of W queries for each (row, lane).

    Args:
        rows: Rows of the page tables.
        window: W.
        lanes: Lane slots of this rank.
        group: Query heads per KV head.
        head_dim: D.
        dtype: Of the queries.
        device: Where head pages are.
    """

    def __init__(
        self,
        *,
        rows: int,
        window: int,
        lanes: int,
        group: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.window = window
        self.queries = torch.zeros(
            (rows, window, lanes, group, head_dim), dtype=dtype, device=device
        )
        self._rows = self._places = torch.empty(0, dtype=torch.int64)

    def begin(self, rows: Tensor, lengths: Tensor) -> None:
        """A decode step of ``rows [bs]``, whose requests have so many tokens, the new one included.

        Both int64 on the device.
        """
        self._rows, self._places = rows, lengths % self.window

    def add(self, lane: int, q: Tensor) -> None:
        """Queries ``[bs, n, g, D]`` of the step for the lanes from ``lane`` on."""
        self.queries[self._rows, self._places, lane : lane + q.shape[1]] = q

    def last(self, row: int, length: int, lanes: NDArray[np.int64]) -> Tensor:
        """``[len(lanes), W, g, D]`` of the last W tokens of a request of ``length``, oldest first.

        It must have written W tokens in this row.
        """
        device = self.queries.device
        places = torch.arange(length + 1, length + 1 + self.window, device=device) % self.window
        ring = self.queries[row, places]
        return ring[:, to_device(torch.from_numpy(lanes), device)].transpose(0, 1)

    def shift(self, source: int, target: int) -> None:
        """The lane of slot ``source`` is in slot ``target`` from now on."""
        self.queries[:, :, target] = self.queries[:, :, source]

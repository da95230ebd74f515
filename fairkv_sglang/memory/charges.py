# SPDX-License-Identifier: Apache-2.0
"""What prompts may take until their counts are known, and which of them needed more.

A prompt that is charged less than it could need has a limit on each rank, which the copy into head
pages keeps to (``kernels``: ``room``). Whether it *spilled*, on whichever rank, all ranks find from
the exact counts. It keeps its charge until its row is free.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairkv_sglang.kernels.pages import UNLIMITED
from fairkv_sglang.memory.admission import Asked
from fairkv_sglang.memory.page_ledger import PageLedger, Pages


class Charges:
    """Limits of the rows whose counts are not known; equal on all ranks.

    Args:
        ledger: Pages of all ranks.
    """

    def __init__(self, ledger: PageLedger) -> None:
        self.spills = 0
        """Prompts that needed more pages than they were charged."""
        self.spilled: set[int] = set()
        """Rows of such prompts, to be retracted before the next pass: not all of it is stored."""
        self._ledger = ledger
        self._limited: dict[int, tuple[Pages, Pages]] = {}  # row -> limit, bound

    def admit(self, row: int, asked: Asked) -> None:
        """Charge a prompt."""
        self._ledger.admit(row, asked.owners, asked.limit)
        if np.any(asked.limit < asked.bound):
            self._limited[row] = asked.limit, asked.bound

    def lift(self, row: int) -> None:
        """The prompt ends in the next forward: it may take its bound, if nobody misses the pages.

        That is, while another prompt like it could still be admitted, or if it is alone. So
        prompts spill on a full server only.
        """
        if row not in self._limited:
            return
        limit, bound = self._limited[row]
        reserve = self._ledger.charge(row) if len(self._ledger) > 1 else 0
        if np.all(self._ledger.free - (bound - limit) >= reserve):
            self._ledger.charge_more(row, bound - limit)
            del self._limited[row]

    def room(self, row: int, rank: int) -> int:
        """Pages that the prompt may take on a rank."""
        return int(self._limited[row][0][rank]) if row in self._limited else UNLIMITED

    def spill(self, row: int, kept: NDArray[np.integer]) -> bool:
        """Whether ``kept [L, H]`` tokens are more than a rank has stored of them; counted."""
        if row not in self._limited:
            return False
        limit, _ = self._limited[row]
        if np.all(self._ledger.pages(row, kept) <= limit):
            return False
        self.spilled.add(row)
        self.spills += 1
        return True

    def release(self, row: int) -> None:
        """The row is free."""
        self._ledger.release(row)
        self._limited.pop(row, None)
        self.spilled.discard(row)

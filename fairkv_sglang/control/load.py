# SPDX-License-Identifier: Apache-2.0
"""How full a server is, for whoever shares requests out over several: routers, SGLang's controller
of replicas.

SGLang counts the slots of its pool. Under FairKV a request holds those during its prefill alone;
what bounds how many run is the head pages of the fullest rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fairkv_sglang.memory.page_ledger import PAGE_TOKENS
from fairkv_sglang.memory.rows import RowBook


@dataclass(frozen=True)
class Load:
    """Tokens of mean budget, all heads of all layers counting as one token.

    Attributes:
        used: Tokens that are not free.
        total: Tokens that the rank with fewest pages for its lanes can hold.
        kept: Part of a prompt's tokens that the prompts so far kept; 1 before the first.
    """

    used: int
    total: int
    kept: float

    @property
    def usage(self) -> float:
        """``used`` over ``total``."""
        return self.used / self.total


def load_of(book: RowBook, pool_usage: float) -> Load:
    """The load of a server by one rank's book, the same by all of them.

    Args:
        book: Rows of a rank.
        pool_usage: Part of the prefill pool that prompts hold; a server whose pool is full has no
            room for a prompt, whatever its head pages are.
    """
    pages = np.maximum(book.demand.expected_lanes, 1.0) / PAGE_TOKENS  # of a token, by rank
    total = max(1, int((book.ledger.capacity / pages).min()))
    free = int((book.ledger.free / pages).min())
    used = max(total - free, int(np.ceil(pool_usage * total)))
    tokens = book.kept_prompt_tokens * book.kept_sum.size
    kept = float(book.kept_sum.sum() / tokens) if tokens else 1.0
    return Load(used=min(used, total), total=total, kept=kept)

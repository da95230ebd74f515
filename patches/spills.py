# SPDX-License-Identifier: Apache-2.0
"""Requests whose prompts needed more head pages than they were charged: retracted, then certain.

A prompt's result says so (``RowBook.hand_over``). By then a decode step with the request may be
under way, so it counts as retracted at once, which makes SGLang drop what that step gives. Its row
goes before the next pass is put together, but it waits from the one after that on: admitted again
it no longer counts as retracted, and would get the token of the old step.
"""

from __future__ import annotations

import logging
from typing import Any

from fairkv_sglang.memory.rows import RowBook

logger = logging.getLogger(__name__)

_SPILLED = "fairkv_spilled"  # on a request of SGLang's, for good


def mark_spilled(req: Any) -> None:
    """The prompt has spilled."""
    setattr(req, _SPILLED, True)
    req.is_retracted = True


def has_spilled(req: Any) -> bool:
    """Whether its prompt has ever spilled: it is to be charged the most that it could need."""
    return bool(getattr(req, _SPILLED, False))


def retract_spilled(book: RowBook, running: Any) -> list[Any]:
    """Take requests whose prompts have spilled out of SGLang's running batch.

    Nobody needs their slots, so no cached prefix is evicted: theirs are to be found again.

    Returns:
        The requests; they wait nowhere yet.
    """
    if not book.charges.spilled:
        return []
    kept, spilled = [], []
    for index, req in enumerate(running.reqs):
        if req.kv.holds_kv and req.kv.req_pool_idx in book.charges.spilled:
            running.release_req(index, 0)
            spilled.append(req)
        else:
            kept.append(index)
    running.filter_batch(keep_indices=kept)
    logger.info("FairKV: %d prompts needed more than they were charged, read again", len(spilled))
    return spilled

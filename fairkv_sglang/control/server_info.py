# SPDX-License-Identifier: Apache-2.0
"""What a server says of itself: the ``fairkv`` part of the info endpoint, and metrics.

The info request reaches every rank's scheduler over SGLang's ZMQ channel in the same order, so a
collective inside the handler is safe; only the first rank's answer goes back to the caller.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.attention.hand_over import HandOver
from fairkv_sglang.budgets import Scorer
from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.control.in_force import PlanInForce
from fairkv_sglang.control.replan import Replanner
from fairkv_sglang.memory import MemoryDivision
from fairkv_sglang.memory.rows import RowBook
from fairkv_sglang.parallel import TwinWeights
from fairkv_sglang.planning import budget_text
from fairkv_sglang.transfer.rows import Moved
from fairkv_sglang.version import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankReport:
    """What there is to say of a rank, and of a server of such ranks; in plain JSON types.

    Attributes:
        config: Resolved configuration.
        scorer: Importance of tokens.
        in_force: The plan.
        division: Division of the KV memory.
        book: Rows of this rank.
        twins: Weights of its lanes.
        hand_over: Kept rows that it sends and gets.
        replanner: None where plans never change.
        prefill_backend: Class of SGLang's backend for prompts.
        decode_backend: Name of the implementation that decodes.
        moved: Kept rows from a prefill to a decode server.
    """

    config: FairKVConfig
    scorer: Scorer
    in_force: PlanInForce
    division: MemoryDivision
    book: RowBook
    twins: TwinWeights
    hand_over: HandOver
    replanner: Replanner | None
    prefill_backend: str
    decode_backend: str
    moved: Moved

    def rank(self) -> dict[str, Any]:
        """State of this rank; sizes in bytes, pages and tokens as named."""
        book, division, pages = self.book, self.division, self.book.pages
        heads, replanner = book.heads, self.replanner
        return {
            "rank": heads.rank,
            "lanes": sum(map(len, heads.heads)),
            "lane_slots": heads.num_lanes,
            "pool_tokens": division.pool_tokens,
            "pool_bytes": division.pool_bytes,
            "total_bytes": division.total_bytes,
            "page_bytes": pages.page_bytes,
            "pages": pages.num_pages,
            "pages_used": pages.num_used,
            "tokens_stored": int(pages.lens.sum()),
            "pages_charged": int(book.ledger.held[heads.rank]),
            "peak_pages_charged": int(book.peak_pages[heads.rank]),
            "requests": book.live_requests,
            "peak_requests": book.peak_requests,
            "max_requests": division.max_requests,
            "handed_over_tokens": book.handed_over_tokens,
            "prefill_backend": self.prefill_backend,
            "hand_over_bytes": self.hand_over.bytes_sent,
            "moved_prompts": self.moved.prompts,
            "moved_bytes": self.moved.bytes,
            "twin_bytes": self.twins.bytes,
            "replan_passes": replanner.passes if replanner else 0,
            "replan_seconds": replanner.seconds if replanner else 0.0,
            "replan_longest_seconds": replanner.longest if replanner else 0.0,
            "lane_weight_bytes": self.twins.bytes_brought,
            "decisions": {"count": book.log.count, "digest": book.log.digest},
        }

    def outputs(self) -> dict[str, Any] | None:
        """How outputs are compressed, and how often they were; None: they are all kept."""
        config, outputs = self.config, self.book.outputs
        if outputs is None:
            return None
        return {
            "slack": config.decode_slack,
            "scorer": config.decode_scorer,
            "window": config.decode_window,
            "redundancy": config.decode_redundancy,
            "compressions": outputs.compressions,
            "freed_pages": outputs.freed_pages.tolist(),
        }

    def server(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """State of the server.

        The names down to ``rank_loads`` are stable; ``head_pages_*`` are those of ``rank``, the
        rank that answers. ``kept_tokens`` of all heads came out of ``prompt_tokens`` in
        ``compactions`` prompts, so ``kept_tokens / (prompt_tokens * layers * heads)`` is the part
        that was kept.

        Args:
            ranks: State of each rank, in their order.
        """
        config, book, plan, replanner = self.config, self.book, self.in_force.plan, self.replanner
        residents, mine = book.residents, ranks[book.heads.rank]
        return {
            "enabled": True,
            "scorer": config.scorer,
            "scope": config.scope,
            "placement": plan.policy,
            "rank": mine["rank"],
            "head_pages_total": mine["pages"],
            "head_pages_used": mine["pages_used"],
            "kept_tokens": int(book.kept_sum.sum()),
            "prompt_tokens": book.kept_prompt_tokens,
            "compactions": book.kept_prompts,
            "spills": book.charges.spills,
            "outputs": self.outputs(),
            "balancedness": residents.balancedness(),
            "balancedness_planned": self.in_force.balancedness,
            "rank_loads": residents.reads.sum(axis=0).tolist(),
            "replan": config.replan if replanner else "off",
            "replans": replanner.adopted if replanner else 0,
            "replan_pending": bool(replanner and replanner.pending),
            "plan_source": self.in_force.source,
            "profile": str(config.profile) if config.profile else None,
            "window": self.scorer.window,
            "options": _plain({**config.options("scorer"), **config.options("scope")}),
            "decode_backend": self.decode_backend,
            "traffic": {**book.recorder.summary(), "tokens": book.recorder.tokens.tolist()},
            "version": __version__,
            "budget": budget_text(config),
            "copies": int(plan.copy_counts().sum()),
            "planned": _plain(plan.info),
            "plan": json.loads(plan.to_json()),
            "plan_digest": plan.digest,
            "kept": {
                "prompts": book.kept_prompts,
                "prompt_tokens": book.kept_prompt_tokens,
                "tokens": book.kept_sum.tolist(),
            },
            "ranks": ranks,
            "decisions_agree": len({rank["decisions"]["digest"] for rank in ranks}) == 1,
        }


def guarded(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` says, or that it failed: a question about a server never stops it.

    Args:
        make: Makes a state of JSON types.

    Returns:
        The state; ``error`` with a line if it cannot be made or is not JSON (NaN, say).
    """
    try:
        state = make()
        json.dumps(state, allow_nan=False)
    except Exception as error:  # whatever it is
        logger.exception("FairKV: this server's state cannot be told")
        return {"enabled": True, "error": " ".join(f"{type(error).__name__}: {error}".split())}
    return state


def _plain(value: Any) -> Any:
    """Only types that SGLang's message format carries."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    return value

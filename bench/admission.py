# SPDX-License-Identifier: Apache-2.0
"""``python -m fairkv_sglang.bench.admission REQUESTS``: head pages that admission leaves idle.

A simulation with the product's own budget, ledger, bounds and router: prompts of recorded requests
come whenever one fits, decode their output and leave. Four ways of charging a prompt whose counts
are not known yet are compared: ``exact`` knows them (an oracle), ``first`` sets aside the most that
they could be, on every rank that has copies, beside all outputs to come, ``bound`` the most that
they could be with the prompt's owners, in the room of outputs to come. ``now`` is what the server
does: it charges what the last prompts let expect, and a prompt that takes more (it *spills*) is
retracted and comes back, first in the queue, charged its bound. Idle is the part of the requests
that decode at a time under ``exact``, mean over the steps, for which the others leave no pages.

The last prompts soon are all that the file has, so ``unseen`` says how many of them would spill if
only other prompts had been seen.
"""

from __future__ import annotations

import argparse
from collections import deque
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray

from fairkv_sglang.budgets import BudgetScope, BudgetSpec, make_scope, make_scorer
from fairkv_sglang.cli.output import print_table
from fairkv_sglang.kernels import HeadPages
from fairkv_sglang.memory.demand import PageDemand
from fairkv_sglang.memory.forecast import forecast_pages
from fairkv_sglang.memory.page_ledger import PAGE_TOKENS, PageLedger, Pages
from fairkv_sglang.memory.rows import RowBook
from fairkv_sglang.parallel import LaneTable, RankHeads
from fairkv_sglang.patches.prefill_budget import FairKVPrefillBudget
from fairkv_sglang.placement import Planner, Router
from fairkv_sglang.placement.requests import Requests, read_requests

CHARGES = ("first", "bound", "now", "exact")
NEVER = 1e6  # times a forecast, which then is above any bound
PROMPT, RATIO, LAYERS, PROMPTS_A_PASS = 4096, 0.25, 8, 2
NEW_TOKEN_RATIO = 0.3  # of their output that running requests are expected to write
WARM_UP = 900  # steps until the load is steady; the first prompts are charged their bounds


class Known(PageDemand):
    """The pages of ``kept [L, H]``, known before they are scored."""

    kept: NDArray[np.int64]

    def _pages(self, scope: BudgetScope, prompt_len: int, mine: NDArray[np.bool_]) -> Pages:
        pages: Pages = (-(-self.kept // PAGE_TOKENS)[:, None, :] * mine).sum(axis=(0, 2))
        return pages


class Before(FairKVPrefillBudget):
    """Admission until it asked for owners: the most on whichever rank, beside all outputs."""

    def check_prefill(
        self, *, max_new_tokens: int, input_tokens: int, chunk_limit: int | None, **others: int
    ) -> tuple[bool, int | None]:
        """See the base class."""
        demand = self.book.demand
        lasting = demand.lone_request(input_tokens) + demand.lanes * -(
            -max_new_tokens // PAGE_TOKENS
        )
        if np.any(lasting > self._left()):
            return False, None
        self._candidate = self.book.admission.ask(input_tokens), lasting
        return True, chunk_limit


def simulate(
    kept: NDArray[np.int64], tp: int, policy: str, charge: str, fit: int, output: int, steps: int
) -> tuple[float, float, float]:
    """Requests that decode at a time, and the parts of all that were retracted and that spilled.

    Args:
        kept: ``[N, L, H]`` kept tokens of recorded requests, drawn with a fixed seed.
        tp, policy: Ranks and placement policy.
        charge: One of :data:`CHARGES`.
        fit: Mean requests, at half of their output, that the fullest rank has pages for.
        output: Tokens that each request writes.
        steps: Decode steps after the load is steady.
    """
    layers, heads = kept.shape[1:]
    rng = np.random.default_rng(1)
    plan = Planner(policy=policy, tp_size=tp).from_expectation(kept.mean(axis=0))
    scope = make_scope("layer", BudgetSpec(ratio=RATIO), layers, heads, make_scorer("snapkv"))
    demand = (Known if charge == "exact" else PageDemand)(scope, plan.shares() > 0)
    mean = -(-(kept + output // 2) // PAGE_TOKENS).mean(axis=0)
    pages = int(fit * (mean[:, None, :] * plan.shares()).sum(axis=(0, 2)).max())
    rank = RankHeads(plan, 0, 1, LaneTable(plan, None))
    book = RowBook(
        heads=rank,
        scope=scope,
        demand=demand,
        router=Router(plan),
        ledger=PageLedger(np.full(tp, pages)),
        pages=HeadPages.create(1, 1, rank.num_lanes, 1, 1, torch.float32),
        pool_tokens=1 << 30,
        forecast_factor=1.0 if charge == "now" else NEVER,
    )
    pool = SimpleNamespace(
        page_size=1,
        available_size=lambda: 1 << 30,
        evictable_size=lambda: 0,
        supports_mamba=lambda: False,
    )
    written: dict[int, int] = {}  # row -> tokens
    unsettled: dict[int, NDArray[np.int64]] = {}
    at_once, retracted, row = [], 0, 0
    waiting: deque[tuple[NDArray[np.int64], bool]] = deque()  # what it keeps, whether it spilled
    for step in range(WARM_UP + steps):
        for ended, counts in unsettled.items():
            book.note_kept(ended, torch.from_numpy(counts))
            if book.hand_over(ended, PROMPT):
                book.free(ended)
                waiting.appendleft((counts, True))
            else:
                written[ended] = 0
        unsettled = {}
        for done in [r for r, tokens in written.items() if tokens >= output]:
            book.free(done)
            del written[done]
        budget = (Before if charge == "first" else FairKVPrefillBudget)(pool, pool, book)
        budget.total_offset += sum(output - n for n in written.values()) * NEW_TOKEN_RATIO
        for _ in range(PROMPTS_A_PASS):
            if not waiting:
                waiting.append((kept[rng.integers(len(kept))], False))
            chosen, spilled = waiting[0]
            if isinstance(demand, Known):
                demand.kept = chosen
            book.admission.certain = spilled
            fits, _ = budget.check_prefill(
                extend_input_len=PROMPT,
                total_tokens=PROMPT + output,
                max_new_tokens=output,
                input_tokens=PROMPT,
                chunk_limit=None,
            )
            if not fits:
                break
            row += 1
            budget.reserve(PROMPT, output)
            book.admit(row, PROMPT, spilled=spilled)
            unsettled[row] = chosen
            waiting.popleft()
        for new in unsettled:
            book.charges.lift(new)
        while not book.ledger.can_grow(list(written)):
            book.free(written.popitem()[0])
            retracted += 1
        book.grow(list(written))
        written = {r: tokens + 1 for r, tokens in written.items()}
        if step >= WARM_UP:
            at_once.append(len(written))
    return float(np.mean(at_once)), retracted / row, book.charges.spills / row


def unseen(requests: Requests, tp: int, policy: str) -> float:
    """The part of the requests that spill if those with other prompts were seen before."""
    kept = recorded(requests)
    layers, heads = kept.shape[1:]
    plan = Planner(policy=policy, tp_size=tp).from_expectation(kept.mean(axis=0))
    scope = make_scope("layer", BudgetSpec(ratio=RATIO), layers, heads, make_scorer("snapkv"))
    spilled = 0
    for counts, context in zip(kept, requests.context, strict=True):
        others = kept[requests.context != context]
        owners = Router(plan).choose(others.mean(axis=0))
        limit = forecast_pages(scope, others, PROMPT, owners, tp)
        taken = (-(-counts // PAGE_TOKENS)).ravel()
        spilled += bool(np.any(np.bincount(owners.ravel(), taken, tp) > limit))
    return spilled / len(kept)


def recorded(requests: Requests) -> NDArray[np.int64]:
    """``[N, L, H]`` tokens that scope ``layer`` keeps of recorded requests."""
    heads = requests.kept.shape[2]
    kept = requests.kept[:, :LAYERS] * RATIO * PROMPT * heads
    kept /= requests.kept[:, :LAYERS].sum(axis=2, keepdims=True)
    return np.minimum(np.rint(kept), PROMPT).astype(np.int64)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("requests", help="kept tokens of requests (Tangram's JSON)")
    parser.add_argument("--tp", default="2,8", help="tensor-parallel ranks; default 2,8")
    parser.add_argument("--policy", default="contiguous,fair_copying")
    parser.add_argument("--fit", default="8,32", help="requests that the pages hold; default 8,32")
    parser.add_argument("--output", type=int, default=128, help="tokens each; default 128")
    parser.add_argument("--steps", type=int, default=600, help="decode steps; default 600")
    options = parser.parse_args()
    requests = read_requests(options.requests, budget=RATIO * PROMPT)
    kept = recorded(requests)
    rows = []
    for tp in map(int, options.tp.split(",")):
        for policy in options.policy.split(","):
            new = unseen(requests, tp, policy)
            for fit in map(int, options.fit.split(",")):
                found = {
                    charge: simulate(kept, tp, policy, charge, fit, options.output, options.steps)
                    for charge in CHARGES
                }
                idle = [100 * (1 - found[c][0] / found["exact"][0]) for c in CHARGES[:3]]
                rows.append(
                    [f"TP {tp}, {policy}", fit]
                    + [f"{part:.1f}" for part in idle]
                    + [f"{found['exact'][0]:.1f}"]
                    + [f"{100 * found[charge][1]:.1f}" for charge in CHARGES]
                    + [f"{100 * part:.1f}" for part in (found["now"][2], new)]
                )
    print_table(
        f"prompts of {PROMPT}, {RATIO:.0%} kept, {options.output} new tokens",
        ["placement", "fit"]
        + [f"idle %: {charge}" for charge in CHARGES[:3]]
        + ["at once: exact"]
        + [f"retracted %: {charge}" for charge in CHARGES]
        + ["spilled %: now", "unseen"],
        rows,
    )


if __name__ == "__main__":
    main()

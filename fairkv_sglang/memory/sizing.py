# SPDX-License-Identifier: Apache-2.0
"""How a rank's KV memory is divided: prefill pool, head-page arena, page tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fairkv_sglang.kernels.pages import RUN_PAGES
from fairkv_sglang.memory.page_ledger import PAGE_TOKENS, Pages

# The rows of page tables may take this part of the KV memory; more requests than that are not
# admitted at once. In bfloat16 with D 128 that is 256 for each context that the memory would hold.
TABLE_FRACTION = 1 / 128
# The same for the queries of the last output tokens, where outputs are compressed.
RECENT_FRACTION = 1 / 16
# What the prefill pool has at least, for cached prefixes, where the scheduler needs less.
CACHE_FRACTION = 1 / 16
ID_BYTES = 4
# Head pages per lane without which no request at all could be admitted.
LEAST_PAGES = 3
# The same for the prefill pool and the page tables, in tokens; SGLang's own first request has 40.
LEAST_TOKENS = 64


@dataclass(frozen=True)
class MemoryDivision:
    """The division on every rank; counts are equal on all ranks where SGLang needs them equal.

    Attributes:
        total_bytes: KV memory of a rank, what stock SGLang would give its own pool.
        pool_tokens: Size of the prefill pool in tokens.
        pool_bytes: Bytes of the prefill pool, SGLang's own with its even split, and of scores
            beside its tokens.
        table_bytes: ``[R]`` bytes of page tables: rows, and the runs of all pages.
        arena_pages: ``[R]`` head pages.
        page_bytes: Bytes of one head page (K and V).
        max_requests: Requests that the page tables have rows for.
        max_head_tokens: Longest kept length plus output of one head.
        recent_bytes: ``[R]`` bytes of the queries of the last output tokens.
    """

    total_bytes: int
    pool_tokens: int
    pool_bytes: int
    table_bytes: Pages
    arena_pages: Pages
    page_bytes: int
    max_requests: int
    max_head_tokens: int
    recent_bytes: Pages | None = None

    @property
    def max_pages(self) -> int:
        """Pages that one row of a page table has room for."""
        return -(-self.max_head_tokens // PAGE_TOKENS) + 1

    def describe(self, rank: int, lanes: int) -> str:
        """One line for the start-up log, in bytes and in tokens."""
        arena = int(self.arena_pages[rank])
        mean_tokens = arena * PAGE_TOKENS // max(lanes, 1)
        mib = 1 << 20
        recent = ""
        if self.recent_bytes is not None:
            recent = f" + queries of the last tokens {self.recent_bytes[rank] / mib:.1f} MiB"
        return (
            f"KV memory of rank {rank}: {self.total_bytes / mib:.1f} MiB = prefill pool "
            f"{self.pool_bytes / mib:.1f} MiB ({self.pool_tokens} tokens of full KV) + head "
            f"pages {arena * self.page_bytes / mib:.1f} MiB ({arena} pages, {mean_tokens} tokens "
            f"in each of {lanes} lanes) + page tables {self.table_bytes[rank] / mib:.1f} MiB "
            f"({self.max_requests} requests, {self.max_head_tokens} tokens a head){recent}"
        )


def divide_memory(
    *,
    lane_slots: Pages,
    total_tokens: int,
    stock_heads: int,
    head_dim: int,
    dtype_bytes: int,
    page_size: int,
    context_len: int,
    pass_tokens: int,
    max_requests: int,
    prefill_pool: int | None = None,
    max_head_tokens: int | None = None,
    arena_pages: int | None = None,
    recent_bytes: int = 0,
    score_bytes: int = 0,
    sliding_window: int = 0,
) -> MemoryDivision:
    """Divide the KV memory that stock SGLang would use.

    Args:
        lane_slots: ``[L, R]`` lanes that each rank has room for; they decide the size of tables.
        total_tokens: Tokens that stock SGLang's pool would hold in this memory.
        stock_heads: KV heads per rank in stock SGLang.
        head_dim: D.
        dtype_bytes: Bytes of one K or V element.
        page_size: SGLang's page size.
        context_len: Longest context of the model in tokens.
        pass_tokens: Most prompt tokens of a pass (:func:`most_of_a_pass`).
        max_requests: SGLang's limit of concurrent requests.
        prefill_pool: Tokens of the prefill pool (``--fairkv-prefill-pool``); None: see
            :func:`default_pool`.
        max_head_tokens: Longest kept length plus output of one head; None means the context.
        arena_pages: Overrides the number of head pages of every rank.
        recent_bytes: Bytes of the queries of the last output tokens, of each row and lane slot.
        score_bytes: Bytes of the scores beside each token of the prefill pool.
        sliding_window: Tokens that heads with a sliding window hold; 0 if there are none.

    Raises:
        ValueError: if the parts do not fit, with the value that would.
    """
    vector = 2 * head_dim * dtype_bytes
    layers = len(lane_slots)
    total_bytes = total_tokens * stock_heads * vector * layers
    page_bytes = PAGE_TOKENS * vector
    lanes = np.asarray(lane_slots).sum(axis=0).astype(np.int64)  # [R]

    pool_tokens = prefill_pool or default_pool(total_tokens, context_len, pass_tokens)
    pool_tokens = pool_tokens // page_size * page_size
    pool_bytes = (pool_tokens + page_size) * (stock_heads * layers * vector + score_bytes)
    if pool_tokens < 1 or pool_bytes >= total_bytes:
        raise ValueError(
            f"a prefill pool of {pool_tokens} tokens needs {pool_bytes} bytes, the KV memory is "
            f"{total_bytes} bytes: give a smaller --fairkv-prefill-pool or more memory "
            "(--mem-fraction-static, --max-total-tokens)"
        )

    least = min(LEAST_TOKENS, context_len) + page_size
    if pool_tokens < least:
        raise ValueError(
            f"a prefill pool of {pool_tokens} tokens holds no prompt: give --fairkv-prefill-pool "
            f"at least {-(-least // page_size) * page_size}, or more memory"
        )

    head_tokens = min(max_head_tokens or context_len, context_len)
    least = max(min(LEAST_TOKENS, context_len), sliding_window)
    if head_tokens < least:
        what = "no prompt with its output" if least > sliding_window else "no sliding window"
        raise ValueError(
            f"heads of {head_tokens} tokens hold {what}: give --fairkv-max-head-tokens at least "
            f"{max(LEAST_TOKENS, sliding_window)}"
        )
    row_bytes = lanes * -(-(-(-head_tokens // PAGE_TOKENS) + 1) // RUN_PAGES) * ID_BYTES
    rows = min(max_requests, int(total_bytes * TABLE_FRACTION // int(row_bytes.max())) - 1)
    if recent_bytes:
        most = int(total_bytes * RECENT_FRACTION // (recent_bytes * int(lanes.max())))
        if most < 2:
            raise ValueError(
                f"the queries of the last output tokens do not fit into {RECENT_FRACTION:.1%} of "
                f"the KV memory ({total_bytes} bytes): give a smaller --fairkv-decode-window or "
                "more memory"
            )
        rows = min(rows, most - 1)
    if rows < 1:
        raise ValueError(
            f"page tables for heads of {head_tokens} tokens do not fit into "
            f"{TABLE_FRACTION:.1%} of the KV memory ({total_bytes} bytes): give a smaller "
            "--fairkv-max-head-tokens or more memory"
        )
    row_table_bytes = (rows + 1) * row_bytes
    all_recent = (rows + 1) * lanes * recent_bytes
    run_bytes = RUN_PAGES * ID_BYTES

    left = total_bytes - pool_bytes - row_table_bytes - all_recent
    pages = left // (page_bytes + run_bytes)
    if arena_pages is not None:
        pages = np.full_like(pages, arena_pages)
    # Per lane: one page of the prompt, the spare page of admission and that of a retraction.
    least = LEAST_PAGES * lanes
    if np.any(pages < least):
        rank = int(np.argmin(pages - least))
        raise ValueError(
            f"rank {rank} has room for {int(pages[rank])} head pages, a single request may take "
            f"{int(least[rank])} ({LEAST_PAGES} in each of {int(lanes[rank])} lanes): give a "
            "smaller --fairkv-prefill-pool or more memory"
        )
    return MemoryDivision(
        total_bytes=total_bytes,
        pool_tokens=pool_tokens,
        pool_bytes=pool_bytes,
        table_bytes=row_table_bytes + pages * run_bytes,
        arena_pages=pages,
        page_bytes=page_bytes,
        max_requests=rows,
        max_head_tokens=head_tokens,
        recent_bytes=all_recent if recent_bytes else None,
    )


def most_of_a_pass(chunk: int | None, max_prefill_tokens: int | None) -> int:
    """Prompt tokens that SGLang's scheduler puts into one pass at most.

    Args:
        chunk: Chunked-prefill size; None, 0 and negative numbers switch chunking off.
        max_prefill_tokens: What bounds a pass then.
    """
    return chunk if chunk is not None and chunk > 0 else max(0, max_prefill_tokens or 0)


def default_pool(total_tokens: int, context_len: int, pass_tokens: int) -> int:
    """Tokens of the prefill pool where nobody says how many.

    A prompt holds its slots until the result of its last chunk is there; by then the next pass has
    its own. So the scheduler needs room for the longest request (prompt and output, should it be
    retracted) and one pass. What prompts do not hold caches prefixes, for which there is a
    sixteenth of the memory at least; never more than half goes here.
    """
    needed = context_len + pass_tokens
    return max(int(total_tokens * CACHE_FRACTION), min(needed, total_tokens // 2))

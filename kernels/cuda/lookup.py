# SPDX-License-Identifier: Apache-2.0
"""Where a page of a (row, lane) stands: its run's first page, then the run (see `layout`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def page_of(  # type: ignore[no-untyped-def]
    table, runs, cell, number, max_runs, mask, RUN: tl.constexpr
):
    """Page `number` of a cell of the tables; both broadcast, int64."""
    first = tl.load(table + cell * max_runs + number // RUN, mask=mask, other=0).to(tl.int64)
    return tl.load(runs + first * RUN + number % RUN, mask=mask, other=0).to(tl.int64)

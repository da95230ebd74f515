# SPDX-License-Identifier: Apache-2.0
"""The budget manager: head pages, page ledger, admission, and the hand-over of prompt slots."""

from fairkv_sglang.memory.demand import PageDemand
from fairkv_sglang.memory.page_ledger import PAGE_TOKENS, PageLedger
from fairkv_sglang.memory.sizing import MemoryDivision, divide_memory

__all__ = ["PAGE_TOKENS", "MemoryDivision", "PageDemand", "PageLedger", "divide_memory"]

# SPDX-License-Identifier: Apache-2.0
"""SGLang's paged allocator with torch in place of its two Triton kernels."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive
from sglang.srt.utils import get_num_new_pages

from fairkv_sglang.patches.overrides import overrides


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):  # type: ignore[misc]
    """Page allocation for ``page_size > 1`` without Triton."""

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for the new tokens of a prefill batch, int64 ``[extend_num_tokens]``; None when
        short.
        """
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if num_new_pages > len(self.free_pages):
            self.merge_and_sort_free()
        if num_new_pages > len(self.free_pages):
            return None
        slots = torch.empty(extend_num_tokens, dtype=torch.int64, device=self.device)
        alloc_extend_naive(
            prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device
        )
        self.free_pages = self.free_pages[num_new_pages:]
        return slots

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One slot per request, int64 ``[batch]``: the next of its page or the first of a new
        page.
        """
        starts_page = (seq_lens - 1) % self.page_size == 0
        num_new_pages = int(starts_page.sum())
        if num_new_pages > len(self.free_pages):
            self.merge_and_sort_free()
        if num_new_pages > len(self.free_pages):
            return None
        slots = last_loc.to(torch.int64) + 1
        slots[starts_page] = self.free_pages[:num_new_pages] * self.page_size
        self.free_pages = self.free_pages[num_new_pages:]
        return slots


OVERRIDES = overrides(
    CpuPagedAllocator,
    "sglang.srt.mem_cache.allocator.PagedTokenToKVPoolAllocator",
    {
        "alloc_extend": "slots of a prompt without Triton",
        "alloc_decode": "slots of a decode step without Triton",
    },
    callers=("sglang.srt.mem_cache.allocation",),
    since="0.5.20",
    test="tests/engine/test_platform.py",
)

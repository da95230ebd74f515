# SPDX-License-Identifier: Apache-2.0
"""SGLang's out-of-tree platform for machines without an accelerator.

SGLang's own CPU engine needs ``sgl_kernel``, of which there is no build for plain CPUs. This
platform uses the native torch paths instead: real scheduler, radix tree, ZeroMQ, tensor-parallel
processes and gloo collectives, with attention by ``torch_native``. It is for development, tests and
small models.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


def is_active() -> bool:
    """True if SGLang runs on this platform in this process."""
    from sglang.srt.platforms import current_platform

    return isinstance(current_platform, CpuPlatform)


class CpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """A CPU without ``sgl_kernel``."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        """SDPA per sequence."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """Own key: fused layers look for ``forward_cpu_native``, then take ``forward_native``."""
        return "cpu_native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """There is no device to pin memory for."""
        return False

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """SGLang chooses its AMX backend on CPUs that have AMX; that one needs ``sgl_kernel``."""
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = "torch_native"

    def init_backend(self) -> None:
        """Nothing to start."""

    def get_mha_kv_pool_cls(self) -> type:
        """SGLang's own pool; its writes have torch paths."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_kv_pool_cls(self, *, kind: str) -> None:
        """SGLang from 0.5.22 on asks this one first; its own pools do."""

    def get_paged_allocator_cls(self) -> type:
        """SGLang's allocator with torch in place of its two Triton kernels."""
        return paged_allocator()


def paged_allocator() -> type:
    """Build the allocator class (imported late: SGLang's modules are not all loadable at
    activation).
    """
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive
    from sglang.srt.utils import get_num_new_pages

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

    return CpuPagedAllocator

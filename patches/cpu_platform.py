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

from fairkv_sglang.patches.overrides import overrides
from fairkv_sglang.patches.versions import pool_class_method


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

    def get_torch_profiler_activity_str(self) -> str:
        """A name of its own: SGLang knows ``CPU`` itself, and would start two profilers for it."""
        return self.device_name

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        """What that name stands for."""
        return torch.profiler.ProfilerActivity.CPU

    def get_paged_allocator_cls(self) -> type:
        """SGLang's allocator with torch in place of its two Triton kernels."""
        from fairkv_sglang.patches.cpu_allocator import CpuPagedAllocator

        return CpuPagedAllocator


OVERRIDES = overrides(
    CpuPlatform,
    "sglang.srt.platforms.interface.SRTPlatform",
    {
        "get_default_attention_backend": "SGLang's own CPU backend needs sgl_kernel",
        "get_dispatch_key_name": "fused layers take their torch paths",
        "is_pin_memory_available": "there is no device to pin memory for",
        "apply_server_args_defaults": "on CPUs with AMX SGLang chooses a backend of sgl_kernel",
        "init_backend": "there is nothing to start",
        pool_class_method(): "a platform of its own has to name its pool",
        "get_torch_profiler_activity_str": "SGLang profiles on every platform of its own",
        "get_torch_profiler_activity": "SGLang profiles on every platform of its own",
        "get_paged_allocator_cls": "SGLang's allocator needs Triton",
    },
    callers=(
        "sglang.srt.arg_groups.model_override_base",
        "sglang.srt.arg_groups.platform_hook",
        "sglang.srt.managers.scheduler_components.profiler_manager",
        "sglang.srt.mem_cache.kv_cache_configurator",
        "sglang.srt.model_executor.model_runner",
        "sglang.srt.utils.common",
        "sglang.kernels.fused_op",
    ),
    since="0.5.20",
    test="tests/engine/test_platform.py",
)

# SPDX-License-Identifier: Apache-2.0
"""SGLang's own registries: attention backend and prefix cache. Typed seams, preferred to hooks."""

from __future__ import annotations

from typing import Any

from fairkv_sglang.runtime import get_runtime

ATTENTION_BACKEND = "fairkv"


def create_attention_backend(runner: Any) -> Any:
    """Factory of the ``fairkv`` attention backend.

    Args:
        runner: SGLang's model runner, pools built.
    """
    from sglang.srt.distributed import get_tp_group

    from fairkv_sglang.attention.backend import FairKVAttnBackend
    from fairkv_sglang.attention.decoders import make_decoder

    runtime = get_runtime()
    runtime.verify_hooks()
    device = str(runner.device)
    if device.startswith("cuda"):
        from fairkv_sglang.attention.flashinfer import FlashInferPrefill

        prefill = FlashInferPrefill(runner, runtime)
    else:
        from fairkv_sglang.attention.cpu_prefill import CpuPrefill

        prefill = CpuPrefill(runner)
    group = get_tp_group().device_group if runtime.tp_size > 1 else None
    return FairKVAttnBackend(runner, prefill, make_decoder(runtime, device), runtime, group)


def register_backends(on_cpu: bool) -> None:
    """Enter both backends into SGLang's registries; may be called again.

    On CPU SGLang takes any backend but ``torch_native`` for one that runs Triton, so the backend
    goes in under that name there.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache.registry import (
        register_radix_cache_backend,
        registered_radix_cache_backends,
    )

    from fairkv_sglang.memory.prefix_cache import BACKEND_NAME, build_prefix_cache

    ATTENTION_BACKENDS[ATTENTION_BACKEND] = create_attention_backend
    if on_cpu:
        ATTENTION_BACKENDS["torch_native"] = create_attention_backend
    if BACKEND_NAME not in registered_radix_cache_backends():
        register_radix_cache_backend(BACKEND_NAME, build_prefix_cache)

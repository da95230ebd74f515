# SPDX-License-Identifier: Apache-2.0
"""SGLang's own registries: typed seams, preferred to hooks; and what wraps their products."""

from __future__ import annotations

from typing import Any

import torch

from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.runtime import get_runtime


def register_prefix_cache() -> None:
    """Enter FairKV's prefix cache into SGLang's registry; may be called again."""
    from sglang.srt.mem_cache.registry import (
        register_radix_cache_backend,
        registered_radix_cache_backends,
    )

    from fairkv_sglang.patches.prefix_cache import BACKEND_NAME, build_prefix_cache

    if BACKEND_NAME not in registered_radix_cache_backends():
        register_radix_cache_backend(BACKEND_NAME, build_prefix_cache)


def after_build_backend(result: Any, *, model_runner: Any, **kwargs: Any) -> Any:
    """SGLang's attention backend runs prompts; around it FairKV's, which decodes.

    Args:
        result: The backend that stock SGLang would use.
        model_runner: SGLang's model runner, pools built.
    """
    from sglang.srt.distributed import get_tp_group

    from fairkv_sglang.attention.decoders import make_decoder
    from fairkv_sglang.patches.attention_backend import FairKVAttnBackend

    runtime = get_runtime()
    runtime.verify_hooks()
    device, group, transfer = str(model_runner.device), None, None
    if runtime.tp_size > 1:
        group = get_tp_group().device_group
        if device.startswith("cuda"):
            transfer = torch.distributed.new_group(get_tp_group().ranks)
    # SGLang composes two backends where it chose another one for decode, which is not used here.
    prefill = getattr(result, "prefill_backend", result)
    decoder = make_decoder(runtime, device)
    return FairKVAttnBackend(model_runner, prefill, decoder, runtime, group, transfer)


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.model_executor.model_runner_components.attention_backend_setup."
        "_build_resolved_backend",
        kind="after",
        function=after_build_backend,
        why="decode reads head pages, prompts keep the attention backend that SGLang chose",
        since="0.5.20",
        upstream="sglang/srt/model_executor/model_runner_components/attention_backend_setup.py",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""SGLang's own registries: typed seams, preferred to hooks; and what wraps their products."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

import torch

from fairkv_sglang.attention.compress_all import make_compressor
from fairkv_sglang.attention.compress_outputs import OutputCompressor
from fairkv_sglang.attention.decoders import make_decoder
from fairkv_sglang.attention.exchange import HomeExchange
from fairkv_sglang.attention.hand_over import HandOver
from fairkv_sglang.attention.hidden_scores import HiddenScores
from fairkv_sglang.attention.warm_up import warm_up
from fairkv_sglang.budgets import Rope
from fairkv_sglang.patches import measure
from fairkv_sglang.patches.ledger import Hook, verify
from fairkv_sglang.patches.rank import this_rank


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

    from fairkv_sglang.patches.attention_backend import FairKVAttnBackend

    verify()
    rank = this_rank()
    book, heads = rank.book, rank.heads
    transfer = exchange = None
    if rank.tp_size > 1:
        group = transfer = get_tp_group().device_group
        exchange = HomeExchange(heads.homes, group)
        if book.pages.device.type == "cuda":
            transfer = torch.distributed.new_group(get_tp_group().ranks)
    hand_over = HandOver(heads, book.pages, transfer)
    rope = None  # a request may bring a scorer that needs it
    with nullcontext() if rank.scorer.needs_rope else suppress(RuntimeError):
        rope = _rope(rank.twins.modules[rank.scope.layers[0]], model_runner.model)
    hidden = None
    if rank.gates is not None:
        pool = model_runner.token_to_kv_pool.get_key_buffer(rank.scope.layers[0])
        hidden = HiddenScores(rank.gates, len(pool), len(heads.home), pool.device)
    compressor = make_compressor(book, rank.scorer, hand_over, exchange, rope, hidden)
    if measure.is_asked_for():
        measure.time_compression(compressor)
    # SGLang composes two backends where it chose another one for decode, which is not used here.
    prefill = getattr(result, "prefill_backend", result)
    decoder = make_decoder(rank.config.decode_backend, book.pages, heads, rank.model.sinks)
    warm_up(book.pages, decoder, rank.scorer, heads.lane_start, heads.group_size, rope)
    if book.outputs is not None:
        config = rank.config
        rank.outputs = OutputCompressor(book, config.decode_window, config.decode_redundancy)
    rank.backend = FairKVAttnBackend(model_runner, prefill, decoder, compressor, book)
    return rank.backend


def _rope(attention: torch.nn.Module, model: torch.nn.Module) -> Rope:
    """The rotary embedding of a layer with a budget, the same in all of those."""
    embedding: Any = getattr(attention, "rotary_emb", None)
    # Gemma 3 rotates by another one, of the whole model, which may have other positions.
    whole: Any = getattr(getattr(model, "model", None), "rotary_emb", None)
    if getattr(whole, "rope_type", "default") != "default":
        raise RuntimeError(
            "FairKV: the scorer needs one table of rotations, and this model scales its "
            f"positions ({whole.rope_type}); use --fairkv-scorer snapkv"
        )
    if embedding is None:
        raise RuntimeError("FairKV: the scorer needs rotary embeddings, and the model has none")
    if not hasattr(embedding, "cos_sin_cache"):  # LongRoPE chooses one of two by the batch
        raise RuntimeError(
            "FairKV: the scorer needs one table of rotations, and this model (Phi-3 and 4 with "
            "LongRoPE) has two; use --fairkv-scorer snapkv"
        )
    # Asked each time: SGLang replaces the table when it needs more positions or another dtype.
    return Rope(lambda: embedding.cos_sin_cache, embedding.is_neox_style)


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

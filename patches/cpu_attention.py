# SPDX-License-Identifier: Apache-2.0
"""Attention on CPU: SGLang's torch backend, without its work on tokens that are cached already.

The CPU platform of this package uses it for every server, with FairKV on or off.

For a prompt of N tokens of which P are cached (an earlier chunk, a shared prefix) SGLang's backend
computes attention of N rows and keeps N - P of them; here the N - P rows alone are computed.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention

from fairkv_sglang.patches.overrides import overrides

BLOCK = 512
"""Rows of a call that needs a mask: keeps masks small and skips keys that no row sees."""


class CpuAttnBackend(TorchNativeAttnBackend):  # type: ignore[misc]
    """Causal self-attention of extend batches; anything else goes to SGLang's own code."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._spans: list[tuple[torch.Tensor, int]] = []
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Pool slots and cached length of each prompt, once for all layers."""
        super().init_forward_metadata(forward_batch)
        if not forward_batch.forward_mode.is_extend():
            return
        table = self.req_to_token_pool.req_to_token
        self._masks = {}
        self._spans = [
            (table[row, :length].long(), cached)
            for row, length, cached in zip(
                forward_batch.req_pool_indices.tolist(),
                forward_batch.seq_lens.tolist(),
                forward_batch.extend_prefix_lens.tolist(),
                strict=True,
            )
        ]

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Called by SGLang's ``forward_extend`` after it has stored K and V.

        Args:
            query: ``[tokens, n * g, D]`` of all prompts, one after the other.
            output: The same shape, written.
            k_cache: ``[slots, n, D]`` pool of the layer.
            v_cache: The same for values.
        """
        plain = kwargs.get("causal") and not kwargs.get("is_cross_attn")
        if not plain or kwargs.get("sliding_window_size") is not None:
            return super()._run_sdpa_forward_extend(
                query, output, k_cache, v_cache, *args, **kwargs
            )
        start = 0
        for slots, cached in self._spans:
            end = start + len(slots) - cached
            # Contiguous by head: torch's kernel is a tenth slower on strided rows.
            keys, values = (
                cache[slots].movedim(0, 1).to(query.dtype).contiguous()
                for cache in (k_cache, v_cache)
            )
            # Without a cached part one causal call does it, without a mask.
            step = BLOCK if cached else len(slots)
            for first in range(start, end, step):
                last = min(first + step, end)
                seen = cached + last - start
                rows = scaled_dot_product_attention(
                    query[first:last].movedim(0, 1).contiguous().unsqueeze(0),
                    keys[None, :, :seen],
                    values[None, :, :seen],
                    attn_mask=self._mask(last - first, seen) if cached else None,
                    is_causal=not cached,
                    scale=kwargs.get("scaling"),
                    enable_gqa=bool(kwargs.get("enable_gqa")),
                )
                output[first:last] = rows.squeeze(0).movedim(0, 1)
            start = end
        return output

    def _mask(self, rows: int, seen: int) -> torch.Tensor:
        """``bool [rows, seen]``: the last row sees all, each row before it one token less."""
        found = self._masks.get((rows, seen))
        if found is None:
            found = torch.ones((rows, seen), dtype=torch.bool).tril_(seen - rows)
            self._masks[rows, seen] = found
        return found


_BASE = "sglang.srt.layers.attention.torch_native_backend"

OVERRIDES = overrides(
    CpuAttnBackend,
    f"{_BASE}.TorchNativeAttnBackend",
    {
        "init_forward_metadata": "slots and cached lengths of a pass, once for all layers",
        "_run_sdpa_forward_extend": "cached tokens cost a prompt nothing",
    },
    callers=(_BASE, "sglang.srt.model_executor.runner.eager_runner"),
    since="0.5.20",
    test="tests/patches/test_cpu_attention.py",
)

# SPDX-License-Identifier: Apache-2.0
"""Attention on CPU: SGLang's torch backend, without its work on tokens that are cached already,
or that are behind a sliding window, and with attention sinks.

The CPU platform of this package uses it for every server, with FairKV on or off.

For a prompt of N tokens of which P are cached (an earlier chunk, a shared prefix) SGLang's backend
computes attention of N rows and keeps N - P of them; here the N - P rows alone are computed.

A sink (gpt-oss) is a number for each query head that stands beside the logits in the softmax and
has no value: here a key more, whose logit is the sink, with a value of zeros. SGLang's torch
backend has none.
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
    """Causal self-attention; anything else goes to SGLang's own code."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._spans: list[tuple[torch.Tensor, int]] = []
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self._sinks: torch.Tensor | None = None  # [n * g], of the call

    def forward_extend(self, *args: Any, sinks: Any = None, **kwargs: Any) -> torch.Tensor:
        """SGLang's, with ``sinks [n * g]``."""
        self._sinks = sinks
        return super().forward_extend(*args, **kwargs)

    def forward_decode(self, *args: Any, sinks: Any = None, **kwargs: Any) -> torch.Tensor:
        """SGLang's, with ``sinks [n * g]``."""
        self._sinks = sinks
        return super().forward_decode(*args, **kwargs)

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
        if not kwargs.get("causal") or kwargs.get("is_cross_attn"):
            return super()._run_sdpa_forward_extend(
                query, output, k_cache, v_cache, *args, **kwargs
            )
        window, start = kwargs.get("sliding_window_size"), 0
        for slots, cached in self._spans:
            end = start + len(slots) - cached
            # Contiguous by head: torch's kernel is a tenth slower on strided rows.
            keys, values = (
                cache[slots].movedim(0, 1).to(query.dtype).contiguous()
                for cache in (k_cache, v_cache)
            )
            # Without a cached part one causal call does it, without a mask.
            masked = cached or window is not None or self._sinks is not None
            step = BLOCK if masked else len(slots)
            for first in range(start, end, step):
                last = min(first + step, end)
                seen = cached + last - start
                low = 0 if window is None else max(0, seen - (last - first) - window)
                output[first:last] = self._attend(
                    query[first:last],
                    keys[:, low:seen],
                    values[:, low:seen],
                    self._mask(last - first, seen - low, window) if masked else None,
                    **kwargs,
                )
            start = end
        return output

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The same for one token of each request; without sinks SGLang's own does."""
        if self._sinks is None:
            return super()._run_sdpa_forward_decode(
                query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, *args,
                **kwargs,
            )  # fmt: skip
        window = kwargs.get("sliding_window_size")
        requests = zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)
        for i, (row, length) in enumerate(requests):
            low = 0 if window is None else max(0, length - 1 - window)
            slots = req_to_token[row, low:length].long()
            keys, values = (c[slots].movedim(0, 1).to(query.dtype) for c in (k_cache, v_cache))
            mask = torch.ones((1, length - low), dtype=torch.bool)
            output[i : i + 1] = self._attend(query[i : i + 1], keys, values, mask, **kwargs)
        return output

    def _attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``[rows, n * g, D]`` of ``query`` to ``keys`` and ``values [n, seen, D]``.

        Without a ``mask [rows, seen]`` there are as many rows as keys, and attention is causal.
        """
        causal = mask is None
        if mask is not None and self._sinks is not None:
            added = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
            sinks = self._sinks.to(query.dtype)[:, None, None].expand(-1, len(mask), 1)
            mask = torch.cat([added.expand(len(sinks), *mask.shape), sinks], dim=2)
            keys, values = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (keys, values))
        rows = scaled_dot_product_attention(
            query.movedim(0, 1).contiguous().unsqueeze(0),
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=causal,
            scale=kwargs.get("scaling"),
            enable_gqa=bool(kwargs.get("enable_gqa")),
        )
        return rows.squeeze(0).movedim(0, 1)

    def _mask(self, rows: int, seen: int, window: int | None = None) -> torch.Tensor:
        """``bool [rows, seen]``: the last row sees all, each row before it one token less, and of
        those ``window`` tokens before its own.
        """
        found = self._masks.get((rows, seen, window))
        if found is None:
            found = torch.ones((rows, seen), dtype=torch.bool).tril_(seen - rows)
            if window is not None:
                found.triu_(seen - rows - window)
            self._masks[rows, seen, window] = found
        return found


_BASE = "sglang.srt.layers.attention.torch_native_backend"

OVERRIDES = overrides(
    CpuAttnBackend,
    f"{_BASE}.TorchNativeAttnBackend",
    {
        "init_forward_metadata": "slots and cached lengths of a pass, once for all layers",
        "forward_extend": "attention sinks",
        "forward_decode": "attention sinks",
        "_run_sdpa_forward_extend": "cached tokens, and those behind a window, cost a prompt "
        "nothing; sinks",
        "_run_sdpa_forward_decode": "attention sinks",
    },
    callers=(
        _BASE,
        "sglang.srt.layers.attention.base_attn_backend",
        "sglang.srt.model_executor.runner.eager_runner",
    ),
    since="0.5.20",
    test="tests/patches/test_cpu_attention.py",
)

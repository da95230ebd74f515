# SPDX-License-Identifier: Apache-2.0
"""Prefill on CPU against SGLang's own torch backend: prompts with and without a cached part."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from fairkv_sglang.patches import cpu_attention as cpu

HEADS, GROUP, DIM = 3, 2, 16


def run(backend_class: type, lengths: list[int], cached: list[int], dtype: torch.dtype) -> Any:
    """Output of the tokens that are not cached, all prompts after each other."""
    make = torch.Generator().manual_seed(0)
    slots = torch.randperm(sum(lengths) + 5, generator=make)
    table = torch.zeros((len(lengths) + 1, max(lengths)), dtype=torch.int32)
    for row, length in enumerate(lengths):
        table[row + 1, :length] = slots[sum(lengths[:row]) :][:length]
    k, v = torch.randn((2, len(slots), HEADS, DIM), generator=make).to(dtype)
    tokens = sum(lengths) - sum(cached)
    q = torch.randn((tokens, HEADS * GROUP, DIM), generator=make).to(dtype)
    runner = SimpleNamespace(
        device="cpu",
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        token_to_kv_pool=SimpleNamespace(),
    )
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        req_pool_indices=torch.arange(1, len(lengths) + 1),
        seq_lens=torch.tensor(lengths),
        extend_prefix_lens=torch.tensor(cached),
        extend_seq_lens=torch.tensor(lengths) - torch.tensor(cached),
        out_cache_loc=None,
    )
    backend = backend_class(runner)
    backend.init_forward_metadata(batch)
    out = torch.full_like(q, torch.nan)
    backend._run_sdpa_forward_extend(
        q,
        out,
        k,
        v,
        table,
        batch.req_pool_indices,
        batch.seq_lens,
        batch.extend_prefix_lens,
        batch.extend_seq_lens,
        None,
        scaling=0.3,
        enable_gqa=True,
        causal=True,
        is_cross_attn=False,
        sliding_window_size=None,
    )
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "cached"),
    [([40], [0]), ([40, 7, 90], [0, 6, 64]), ([33, 33], [32, 1]), ([100, 50], [11, 0])],
)
def test_equals_sglangs_backend(
    lengths: list[int], cached: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "BLOCK", 16)
    found = run(cpu.CpuAttnBackend, lengths, cached, dtype)
    want = run(TorchNativeAttnBackend, lengths, cached, dtype)
    tolerance = 2e-6 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found, want, atol=tolerance, rtol=tolerance)


def test_cached_tokens_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    real = cpu.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(query.shape[2])
        return real(query, *args, **kwargs)

    monkeypatch.setattr(cpu, "scaled_dot_product_attention", counted)
    run(cpu.CpuAttnBackend, [600, 30], [590, 0], torch.float32)
    assert rows == [10, 30]

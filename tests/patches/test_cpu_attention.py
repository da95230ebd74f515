# SPDX-License-Identifier: Apache-2.0
"""Prefill on CPU against SGLang's own torch backend: prompts with and without a cached part."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from fairkv_sglang.patches import cpu_attention as cpu

HEADS, GROUP, DIM = 3, 2, 16


def run(
    backend_class: type,
    lengths: list[int],
    cached: list[int],
    dtype: torch.dtype,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> Any:
    """Output of the tokens that are not cached, all prompts after each other.

    With ``cached`` one less than ``lengths`` everywhere it is that of a decode step, too.
    """
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
    backend._sinks = sinks
    backend.init_forward_metadata(batch)
    if all(n == known + 1 for n, known in zip(lengths, cached, strict=True)):
        step = torch.full_like(q, torch.nan)
        backend._run_sdpa_forward_decode(
            q, step, k, v, table, batch.req_pool_indices, batch.seq_lens, None,
            scaling=0.3, enable_gqa=True, causal=False, is_cross_attn=False,
            sliding_window_size=window,
        )  # fmt: skip
    else:
        step = None
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
        sliding_window_size=window,
    )
    if step is not None:
        torch.testing.assert_close(step, out, atol=2e-2, rtol=2e-2)
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


CASES = [([40], [0]), ([40, 7, 90], [0, 6, 64]), ([33, 80], [32, 79])]


@pytest.mark.parametrize("window", [0, 5, 39, 200])
@pytest.mark.parametrize(("lengths", "cached"), CASES)
def test_windows_equal_sglangs(
    lengths: list[int], cached: list[int], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "BLOCK", 16)
    found = run(cpu.CpuAttnBackend, lengths, cached, torch.float32, window)
    want = run(TorchNativeAttnBackend, lengths, cached, torch.float32, window)
    torch.testing.assert_close(found, want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("lengths", "cached"), CASES)
def test_sinks_take_their_part_of_the_softmax(
    lengths: list[int], cached: list[int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sink far below the logits is none; one of s scales by 1 / (1 + e^(s - logsumexp)), so
    those of s and s + log 2 tell the logsumexp, and with it any other.
    """
    monkeypatch.setattr(cpu, "BLOCK", 16)
    heads = HEADS * GROUP

    def with_sink(value: float) -> torch.Tensor:
        sinks = torch.full((heads,), value, dtype=torch.float64)
        return run(cpu.CpuAttnBackend, lengths, cached, torch.float64, window, sinks)

    plain = run(cpu.CpuAttnBackend, lengths, cached, torch.float64, window)
    torch.testing.assert_close(with_sink(-200.0), plain, atol=1e-9, rtol=1e-9)
    one, two = (plain / with_sink(s) - 1 for s in (1.0, 1.0 + math.log(2)))  # e^(s - logsumexp)
    assert bool((one > 0).all())
    torch.testing.assert_close(two, 2 * one, atol=1e-6, rtol=1e-6)
    # the same for all numbers of a head
    torch.testing.assert_close(one, one[..., :1].expand_as(one), atol=1e-6, rtol=1e-6)


def test_cached_tokens_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    real = cpu.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(query.shape[2])
        return real(query, *args, **kwargs)

    monkeypatch.setattr(cpu, "scaled_dot_product_attention", counted)
    run(cpu.CpuAttnBackend, [600, 30], [590, 0], torch.float32)
    assert rows == [10, 30]

# SPDX-License-Identifier: Apache-2.0
"""Virtual ranks: small runs on CPU, and the arithmetic around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairkv_sglang.bench.virtual.rank import Device, decoder, share_seconds
from fairkv_sglang.bench.virtual.settings import PLACEMENTS, VirtualSettings
from fairkv_sglang.bench.virtual.step import (
    cost_model,
    kept_tokens,
    owners_of,
    place,
    run_virtual,
)
from fairkv_sglang.cli.main import main
from fairkv_sglang.model import PRESETS

TINY = PRESETS["tiny"]
FLOAT32 = torch.float32


def settings(**changes: Any) -> VirtualSettings:
    values: dict[str, Any] = {
        "model": TINY,
        "tp": (4,),
        "batch": (8,),
        "budgets": (96,),
        "prompt_len": (512,),
        "repeats": 1,
        "dtype": "float32",
        **changes,
    }
    return VirtualSettings(**values)


def test_the_all_reduce_model() -> None:
    link = settings(bandwidth=100, latency=5)
    assert link.all_reduce_seconds(1e6, 1) == 0
    assert link.all_reduce_seconds(1e6, 4) == pytest.approx(5e-6 + 1.5e6 / 100e9)


def test_rank_local_keeps_equal_totals_on_contiguous_heads() -> None:
    kept = kept_tokens(settings(), 96)
    plan, tokens = place("rank_local", kept, 4, cost_model(settings(), 8))
    loads = np.einsum("lrh,lh->lr", plan.shares(), tokens)
    assert loads.max(axis=1) == pytest.approx(loads.min(axis=1), rel=0.02)
    assert loads.sum() == pytest.approx(kept.sum(), rel=0.01)
    assert plan.policy == "contiguous" and plan.copy_counts().sum() == 0


def test_every_head_of_every_request_has_one_owner_that_serves_it() -> None:
    kept = kept_tokens(settings(), 96)
    plan, tokens = place("fair_copying", kept, 4, cost_model(settings(), 8))
    owners = owners_of(plan, tokens, 8)
    served = plan.shares() > 0
    assert owners.shape == (8, TINY.num_layers, TINY.num_kv_heads)
    for layer, head in np.ndindex(TINY.num_layers, TINY.num_kv_heads):
        assert all(served[layer, rank, head] for rank in owners[:, layer, head])


def test_pages_of_a_share_hold_its_lengths() -> None:
    device = Device("cpu", FLOAT32)
    lengths = np.array([[40, 0], [16, 33], [0, 1]])
    pages = device.pages(lengths, 16)
    pages.check_integrity()
    assert pages.lens[1:].tolist() == lengths.tolist()
    assert pages.owned[1:].tolist() == (lengths > 0).astype(int).tolist()
    smaller = device.pages(lengths[:1], 16)  # the arena is used again
    assert smaller.k_pages.data_ptr() == pages.k_pages.data_ptr()


def test_attention_of_a_share_is_that_of_the_engines_kernel() -> None:
    device = Device("cpu", FLOAT32)
    lengths = np.array([[20, 0], [3, 50]])
    pages = device.pages(lengths, TINY.head_dim)
    rows = torch.tensor([1, 2])
    q = device.random(2, 2 * TINY.group_size, TINY.head_dim)
    out = torch.empty_like(q)
    decoder(device, pages, rows, q, out, TINY.group_size)(0)
    want = torch.empty_like(q)
    pages.kernels.decode(pages, q, rows, 0, 2, TINY.head_dim**-0.5, want)
    assert torch.equal(out, want)
    assert not out[0, TINY.group_size :].any()  # not served here
    assert out[0, : TINY.group_size].any()


def test_what_takes_turns_is_larger_than_a_cache() -> None:
    device = Device("cpu", FLOAT32, cache_bytes=100_000)
    assert device.copies(100_000) == 1 and device.copies(9_000) == 12
    assert device.copies(10**9, least=3) == 3 and device.copies(1) == 256
    assert Device("cpu", FLOAT32).copies(1) == 1
    lengths = np.array([[20, 0], [3, 50]])
    pages, rows = device.pages(np.tile(lengths, 3), TINY.head_dim), torch.tensor([1, 2])
    pages.check_integrity()
    q = device.random(2, 2 * TINY.group_size, TINY.head_dim)
    out, want = torch.empty_like(q), torch.empty_like(q)
    run = decoder(device, pages, rows, q, out, TINY.group_size, sets=3)
    for turn in range(4):
        run(turn)
        lane = 2 * (turn % 3)
        pages.kernels.decode(pages, q, rows, lane, 2, TINY.head_dim**-0.5, want)
        assert torch.equal(out, want)
    weights, attention = share_seconds(device, TINY, lengths)
    assert weights > 0 and attention > 0


def test_pages_can_grow_by_one_page_in_every_lane() -> None:
    pages = Device("cpu", FLOAT32).pages(np.full((3, 5), 16), 8)
    slots = torch.empty((3, 5), dtype=torch.int64)
    pages.kernels.grow(pages, torch.tensor([1, 2, 3]), slots)
    assert pages.lens[1:].tolist() == [[17] * 5] * 3
    assert len(slots.unique()) == 15


def test_a_small_run_of_all_placements() -> None:
    result = run_virtual(settings(layers=2), lambda line: None)
    json.dumps(result, allow_nan=False)
    (case,) = result["cases"]
    assert (case["tp"], case["batch"], case["budget"]) == (4, 8, 96)
    assert set(case["placements"]) == set(PLACEMENTS)
    for name, entry in case["placements"].items():
        assert entry["step_ms"] == pytest.approx(sum(entry["parts"].values()))
        assert all(value > 0 for value in entry["parts"].values())
        assert entry["imbalance"] >= 1
        assert entry["tokens_per_s"] == pytest.approx(8e3 / entry["step_ms"])
        assert len(entry["rank_tokens"]) == 4
        assert name != "rank_local" or entry["balancedness"] > 0.98
    found = {name: entry["balancedness"] for name, entry in case["placements"].items()}
    assert found["fair_copying"] > found["contiguous"]
    total = {sum(e["rank_tokens"]) for n, e in case["placements"].items() if n != "rank_local"}
    assert len(total) == 1  # the same tokens, placed otherwise


def test_threads_are_as_before_after_a_run() -> None:
    before = torch.get_num_threads()
    with Device("cpu", FLOAT32).alone():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_wrong_settings_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="'bfloat16', 'float16' or 'float32'"):
        settings(dtype="int8")
    with pytest.raises(ValueError, match="--decode flashinfer does not run on cpu"):
        Device("cpu", FLOAT32, "flashinfer")
    with pytest.raises(ValueError, match="--tp 3: an MLP of 128"):
        run_virtual(settings(tp=(3,)), lambda line: None)
    with pytest.raises(ValueError, match="--budgets 512: a prompt of 512 tokens is kept whole"):
        run_virtual(settings(budgets=(512,)), lambda line: None)


def test_command_writes_table_json_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "--virtual", "--model", "tiny", "--tp", "2", "--batch", "4", "--layers", "1"]
    words += ["--budgets", "64", "--repeats", "1", "--device", "cpu", "--dtype", "float32"]
    words += ["--placements", "contiguous,fair_copying", "--out", str(tmp_path)]
    assert main(words) == 0
    assert "fair_copying" in capsys.readouterr().out
    data = json.loads((tmp_path / "virtual.json").read_text())
    assert (data["format"], data["version"]) == ("fairkv-virtual", 2)
    assert (tmp_path / "virtual.png").stat().st_size > 5_000

# SPDX-License-Identifier: Apache-2.0
"""The checks of `bench/gpu_check.py` without a GPU: they notice what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fairkv_sglang.attention.hand_over import HandOver
from fairkv_sglang.bench.gpu import step
from fairkv_sglang.bench.gpu.contenders import CONTENDERS
from fairkv_sglang.budgets.scopes import pooled
from fairkv_sglang.kernels import HeadPages
from fairkv_sglang.kernels.cpu import operations as numba_cpu
from fairkv_tests import fake_flashinfer, gpu_checks, gpu_hand_over, gpu_prompts, reference

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[2]


def test_the_cpu_kernels_pass_their_checks() -> None:
    gpu_checks.page_operations(numba_cpu, "cpu", torch.bfloat16, by_columns=True)
    gpu_checks.full_arena(numba_cpu, "cpu", by_columns=True)
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 1e-2)):
        gpu_checks.decode_equals_torch(
            numba_cpu.decode, "cpu", dtype, tolerance, 32, groups=(1, 5, 8)
        )
    assert "bounded" in gpu_hand_over.owners_hold_what_is_kept("cpu", 16)


def slightly_wrong(
    pages: HeadPages,
    q: torch.Tensor,
    rows: torch.Tensor,
    lane_lo: int,
    n: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    reference.decode(pages, q, rows, lane_lo, n, scale * 1.02, out)


def broken(name: str) -> Any:
    """The CPU kernels with one operation that is wrong."""

    def grow(pages: HeadPages, rows: torch.Tensor, slots: torch.Tensor) -> None:
        numba_cpu.grow(pages, rows, slots)
        slots[slots >= 0] ^= 1

    def append(pages: HeadPages, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        numba_cpu.append(pages, slots, v, k)

    def store_kept(pages: HeadPages, *arguments: Any) -> None:
        row, lane_lo, k, v, slots, kept, counts, columns = arguments
        fewer = (counts - 1).clamp(min=0)
        numba_cpu.store_kept(pages, row, lane_lo, k, v, slots, kept, fewer, columns)

    def store_columns(pages: HeadPages, *arguments: Any) -> None:
        columns = arguments[-1]
        numba_cpu.store_kept(
            pages, *arguments[:-1], None if columns is None else columns.clamp(min=0)
        )

    def release(pages: HeadPages, rows: torch.Tensor) -> None:
        numba_cpu.release(pages, rows[:0])

    operations = {n: getattr(numba_cpu, n) for n in ("set_owned", "grow", "append", "store_kept")}
    operations["release"] = numba_cpu.release
    wrong = {"grow": grow, "append": append, "store_kept": store_kept, "release": release}
    wrong["columns"] = store_columns
    replaced = "store_kept" if name == "columns" else name
    return SimpleNamespace(**{**operations, replaced: wrong[name]})


@pytest.mark.parametrize("name", ["grow", "append", "store_kept", "columns", "release"])
def test_page_operations_that_are_wrong_are_noticed(name: str) -> None:
    with pytest.raises(RuntimeError):
        gpu_checks.page_operations(broken(name), "cpu", torch.float32, by_columns=True, rounds=1)


def test_an_overflow_that_nobody_reports_is_noticed() -> None:
    def silent(*arguments: Any) -> None:
        try:
            numba_cpu.grow(*arguments)
        except RuntimeError:
            return

    kernels = SimpleNamespace(set_owned=numba_cpu.set_owned, grow=silent)
    with pytest.raises(RuntimeError, match="error bits 0, expected 1"):
        gpu_checks.full_arena(kernels, "cpu", by_columns=True)


def test_wrong_attention_scores_and_page_lists_are_noticed() -> None:
    with pytest.raises(RuntimeError, match="group 5: differs"):
        gpu_checks.decode_equals_torch(
            slightly_wrong, "cpu", torch.float32, 1e-5, 16, gpu_checks.SHORT, groups=(5,)
        )
    with pytest.raises(RuntimeError, match="differs from torch"):
        gpu_checks.snapkv_equals_torch(
            lambda q, k, scale, *rest: reference.snapkv_score(q, k, scale * 1.1, *rest), "cpu"
        )
    lens, tiles = [0, 40, 129, 1000], [(3, 0), (3, 1), (3, 2), (2, 0), (1, 0)]
    right = gpu_checks.Planned(384, [0, 0, 1, 2, 5], tiles, lens, [])
    gpu_checks._follows_the_rules(right, 4, True)
    for change in (
        {"chunk": 512},
        {"o_indptr": [0, 1, 2, 3, 6]},
        {"tiles": tiles[::-1]},
        {"tiles": [*tiles[:4], (0, 0)]},
        {"lens": [0, 40, 129, 1300]},
    ):
        with pytest.raises(RuntimeError):
            gpu_checks._follows_the_rules(replace(right, **change), 4, True)


@pytest.mark.parametrize("trouble", ["wrong rows", "a dead rank", "sizes that do not fit"])
def test_a_wrong_hand_over_is_noticed(monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    pack, sizes = HandOver._pack, HandOver._sizes

    def wrong(self: HandOver, k_pool: torch.Tensor, *rest: Any) -> None:
        pack(self, k_pool + 1, *rest)

    def dead(self: HandOver, *rest: Any) -> None:
        if self.heads.rank:
            raise RuntimeError("a dead rank")
        pack(self, *rest)

    def larger(self: HandOver, *rest: Any) -> Any:
        return sizes(self, *rest) * (1 + self.heads.rank)

    change: dict[str, Any] = {
        "wrong rows": ("_pack", wrong, "other rows than kept"),
        "a dead rank": ("_pack", dead, "a dead rank"),
        "sizes that do not fit": ("_sizes", larger, "ranks disagree about sizes"),
    }
    name, function, said = change[trouble]
    monkeypatch.setattr(HandOver, name, function)
    with pytest.raises(RuntimeError, match=said):
        gpu_hand_over.owners_hold_what_is_kept("cpu", 16, rounds=1)


def test_what_waits_for_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_hand_over.no_host_synchronisation("cpu", 16) == "9 passes"
    waiting, finish = list[int](), HandOver.finish

    def waits(self: HandOver) -> None:
        waiting.append(1)
        if len(waiting) > 130:  # past the warm-up
            raise RuntimeError("called a synchronizing CUDA operation")
        finish(self)

    monkeypatch.setattr(HandOver, "finish", waits)
    with pytest.raises(
        RuntimeError, match=r"^test_gpu_check.py:\d+: raise .*: called a synchroniz"
    ):
        gpu_hand_over.no_host_synchronisation("cpu", 16)


class NoClock:
    device = "cpu"

    def ms(self, work: Callable[[], object], capture: bool = True) -> float:
        work()
        return 2.0

    def host_us(self, work: Callable[[], object]) -> float:
        work()
        return 5.0


def test_the_hand_over_through_a_collective_is_checked_and_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = gpu_prompts.one_layer(NoClock(), tokens=400, kept=100, dim=16)
    assert set(made) == {"known", "bounded"}
    assert made["known"]["sent_per_kept"] == 1 < made["bounded"]["sent_per_kept"]
    row_bytes = 2 * 16 * 2
    assert made["known"]["gb_per_s"] == pytest.approx(2 * 400 * row_bytes / 2e-3 / 1e9)
    through = gpu_prompts.Mirror.all_to_all_single

    def other_bytes(
        self: Any, out: torch.Tensor, mine: torch.Tensor, *rest: Any, **named: Any
    ) -> Any:
        mine[:7] ^= 1
        return through(self, out, mine, *rest, **named)

    monkeypatch.setattr(gpu_prompts.Mirror, "all_to_all_single", other_bytes)
    with pytest.raises(RuntimeError, match="known: other rows than kept in lane 0"):
        gpu_prompts.one_layer(NoClock(), tokens=400, kept=100, dim=16)


def test_compression_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = gpu_prompts.compressed(NoClock(), 300, layers=2, dim=16)
    assert made == {"us": 1000, "host_us": 2.5, "most_mib": 0}
    short = gpu_prompts.compressed(NoClock(), 40, layers=2, dim=16)  # within its least budget
    assert short["us"] == 1000
    pooled_counts = pooled.pooled_counts
    monkeypatch.setattr(pooled, "pooled_counts", lambda *args: pooled_counts(*args) - 1)
    with pytest.raises(RuntimeError, match="tokens, not"):
        gpu_prompts.compressed(NoClock(), 300, layers=2, dim=16)


def test_slots_across_page_borders_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert step.borders(NoClock(), 3, lanes=17, calls=2) == {"at once": 125, "spread": 125}
    twice = NoClock()
    monkeypatch.setattr(twice, "ms", lambda work: [work() for _ in range(3)], raising=False)
    with pytest.raises(RuntimeError, match="head pages: "):
        step.borders(twice, 3, lanes=17, calls=1)


def test_flashinfers_wrapper_gets_the_folded_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flashinfer.install(monkeypatch)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        gpu_checks.contender_equals_torch(CONTENDERS["stock"], "cpu", dtype, tolerance, 32)


@pytest.mark.slow
def test_checks_and_timings_run_on_models() -> None:
    """Triton interpreted, a model of FlashInfer's kernel, a clock that does not measure."""
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
            str(Path(__file__).with_name("interpreted_gpu.py")),
        ],
        cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout

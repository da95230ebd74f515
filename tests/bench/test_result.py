# SPDX-License-Identifier: Apache-2.0
"""From raw runs to the figures of a case, and their tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fairkv_sglang.bench.engine.report import draw, notes, tables
from fairkv_sglang.bench.engine.result import summarise_case
from fairkv_sglang.bench.engine.settings import EngineSettings
from fairkv_tests.bench_runs import a_run

WORK = EngineSettings(prompts=4, prompt_len=(100,), output_len=11)


def state(pages: list[int]) -> dict[str, Any]:
    return {
        "placement": "fair_copying",
        "scope": "head",
        "budget": "64 tokens per head",
        "copies": 3,
        "planned": {"token_imbalance": 1.25},
        "decisions_agree": True,
        "kept": {"prompts": 8, "tokens": [[400, 112]]},  # mean 50 and 14 tokens
        "ranks": [
            {
                "lanes": 1,
                "total_bytes": 1000,
                "pool_bytes": 100,
                "page_bytes": 64,
                "pages": 50,
                "peak_pages_charged": count,
                "peak_requests": 4,
            }
            for count in pages
        ],
    }


@pytest.fixture
def case() -> dict[str, Any]:
    # every second round the machine is half as fast; contiguous: 20 of 30 ms, 10 could go
    slow = (1.0, 2.0)
    fair = [a_run(3.0 * x, 22.0 * x, 12.0 * x) for x in slow]
    fair[-1]["fairkv"] = state([20, 16])
    return summarise_case(
        {
            "stock": [a_run(8.0 * x, 90.0 * x, 80.0 * x) for x in slow],
            "contiguous": [a_run(4.0 * x, 30.0 * x, 20.0 * x, 10.0 * x) for x in slow],
            "fair_copying": fair,
        },
        WORK,
    )


def test_ratios_pair_runs_of_a_round(case: dict[str, Any]) -> None:
    against = case["ratios"]["stock"]["output_tokens_per_s"]
    assert set(against) == {"contiguous", "fair_copying"}
    assert against["contiguous"]["least"] == against["contiguous"]["most"] == pytest.approx(2)


def test_metrics_are_medians_over_rounds(case: dict[str, Any]) -> None:
    metrics = case["variants"]["contiguous"]["metrics"]
    assert metrics["output_tokens_per_s"]["median"] == pytest.approx((11 + 5.5) / 2)
    assert metrics["ttft_s"]["median"] == 2
    assert metrics["itl_ms"]["median"] == pytest.approx(20)
    assert "balancedness" not in metrics  # no run has it
    assert case["variants"]["contiguous"]["ranks"]["waiting_ms"] == [15, 15]


def test_balancing_is_measured_against_what_the_imbalance_allows(case: dict[str, Any]) -> None:
    assert set(case["balancing"]) == {"fair_copying"}  # not stock: it has no budget
    found = case["balancing"]["fair_copying"]
    assert found["speedup"]["median"] == pytest.approx(30 / 22)
    assert found["allowed"]["median"] == pytest.approx(30 / 20)
    assert found["reached"]["median"] == pytest.approx(20 / 22)
    assert found["reached_gain"] == pytest.approx((30 / 22 - 1) / 0.5)
    assert found["cpu_speedup"]["median"] == pytest.approx(20 / 12)
    assert found["cpu_allowed"]["median"] == pytest.approx(2)


def test_no_share_of_a_gain_where_nothing_can_be_gained() -> None:
    run = a_run(1.0, 20.0, 10.0)
    found = summarise_case({"contiguous": [run], "fair_copying": [run]}, WORK)["balancing"]
    assert found["fair_copying"]["reached_gain"] is None


def test_memory_compares_pages_with_the_tokens_in_them(case: dict[str, Any]) -> None:
    memory = case["variants"]["fair_copying"]["memory"]
    assert memory["page_bytes"] == 36 * 64
    # 4 requests of 50 + 14 kept tokens and 10 appended ones in each of 2 heads
    assert memory["page_overhead"] == pytest.approx(36 * 16 / (4 * (64 + 20)))
    assert case["variants"]["stock"]["memory"] == {"slots": 1000}
    assert case["variants"]["fair_copying"]["plan"]["planned_balancedness"] == pytest.approx(0.8)


def test_a_run_without_measurements_has_throughput_alone() -> None:
    run = {**a_run(1.0, 1.0, 1.0), "measured": {}, "ttft": [], "itl": []}
    found = summarise_case({"contiguous": [run], "fair_copying": [run]}, WORK)
    assert set(found["variants"]["contiguous"]["metrics"]) == {
        "output_tokens_per_s",
        "seconds",
        "retractions",
    }
    assert found["balancing"] == {"fair_copying": {}}


def test_the_document_is_plain_json_and_can_be_shown(case: dict[str, Any], tmp_path: Path) -> None:
    cases = [{"tp": 2, "budget": 64, "max_total_tokens": 1000, **case}]
    document = {"model": "some: 2 layers", "cases": cases}
    again = json.loads(json.dumps(document, allow_nan=False))
    assert again == document
    shown = tables(again)
    assert len(shown) == 4
    for _, columns, rows in shown:
        assert all(len(row) == len(columns) for row in rows)
    # the whole run comes first and is called so, parts are called parts
    title, columns, rows = shown[0]
    assert "some: 2 layers" in title and "whole run, first token included" in title
    assert columns[1] == "tokens/s" and [row[0] for row in rows] == list(case["variants"])
    assert all("part of it" in title for title, *_ in shown[1:])
    assert dict(zip(shown[3][1], shown[3][2][2], strict=True))["of gain"] == "0.73"
    assert len(notes(again)) == 3
    draw(again, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000

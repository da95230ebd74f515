# SPDX-License-Identifier: Apache-2.0
"""From the raw runs of a case to figures: medians, spreads, ratios, and how much balancing gave."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fairkv_sglang.bench.stats import ratios, spread
from fairkv_sglang.bench.variants import BASE, VARIANTS
from fairkv_sglang.bench.workload import Workload

FORMAT = "fairkv-bench"
VERSION = 1
PAGE_TOKENS = 16

Run = Mapping[str, Any]

METRICS: dict[str, Callable[[Run], float | None]] = {
    "output_tokens_per_s": lambda run: run["output_tokens"] / run["seconds"],
    "total_tokens_per_s": lambda run: (
        (run["output_tokens"] + run["prompt_tokens"]) / run["seconds"]
    ),
    "seconds": lambda run: run["seconds"],
    "ttft_s": lambda run: statistics.median(run["ttft"]) if run["ttft"] else None,
    "ttft_p99_s": lambda run: _tail(run["ttft"]),
    "prefill_s": lambda run: max(run["measured"].get("prefill_s", []), default=None),
    "prefill_own_s": lambda run: _own_prefill(run),
    "compress_share": lambda run: _compress_share(run),
    "hand_over_mb_per_prompt": lambda run: _per_prompt(run, "hand_over_bytes", sum, 1e-6),
    "hand_over_ms_per_prompt": lambda run: _per_prompt(run, "hand_over_seconds", max, 1e3),
    "itl_ms": lambda run: 1e3 * statistics.median(run["itl"]) if run["itl"] else None,
    "retractions": lambda run: run["retractions"],
    "peak_requests": lambda run: run["measured"].get("peak_batch"),
    "decode_period_ms": lambda run: run["measured"].get("period_ms"),
    "decode_tokens_per_s": lambda run: _decode_rate(run["measured"]),
    "communication_ms": lambda run: run["measured"].get("communication_ms"),
    "most_waiting_ms": lambda run: max(run["measured"].get("waiting_ms", []), default=None),
    "imbalance": lambda run: run["measured"].get("imbalance"),
    "removable_ms": lambda run: run["measured"].get("removable_ms"),
    "allowed_speedup": lambda run: run["measured"].get("allowed_speedup"),
    "cpu_slowest_ms": lambda run: run["measured"].get("cpu_slowest_ms"),
    "cpu_even_ms": lambda run: run["measured"].get("cpu_even_ms"),
    "cpu_imbalance": lambda run: run["measured"].get("cpu_imbalance"),
    "balancedness": lambda run: run["measured"].get("balancedness"),
}
"""Figures of one run; None where a variant or device has none."""

PER_RANK = ("step_ms", "collective_ms", "waiting_ms", "compute_ms", "cpu_ms", "rank_tokens")
"""Lists by rank in the ranks' measurements; medians over rounds are reported."""

COMPARED = (
    "output_tokens_per_s",
    "total_tokens_per_s",
    "decode_tokens_per_s",
    "ttft_s",
    "prefill_s",
    "prefill_own_s",
)
"""Metrics whose ratios to a base are shown; of times the lower is the better one."""


def _tail(values: Sequence[float]) -> float | None:
    """The 99th percentile (of fewer than 100 values: the largest)."""
    return sorted(values)[max(0, -(-99 * len(values) // 100) - 1)] if values else None


def _own_prefill(run: Run) -> float | None:
    """Seconds of prefill passes before anything of FairKV's, on the rank where they are most."""
    passes = run["measured"].get("prefill_s", [])
    spent = (run.get("prefill") or {}).get("compress_seconds", [0.0] * len(passes))
    return max((a - b for a, b in zip(passes, spent, strict=True)), default=None)


def _compress_share(run: Run) -> float | None:
    """Scoring, selection and handing over, of all of prefill; of the rank where it is most."""
    prefill = run.get("prefill")
    if not prefill:
        return None
    pairs = zip(prefill["compress_seconds"], prefill["prefill_seconds"], strict=True)
    return max((part / whole for part, whole in pairs if whole > 0), default=None)


def _per_prompt(
    run: Run, key: str, over_ranks: Callable[[Sequence[float]], float], scale: float
) -> float | None:
    """A figure of the hand-over for one prompt."""
    prefill = run.get("prefill")
    return over_ranks(prefill[key]) * scale / run["requests"] if prefill else None


def _decode_rate(measured: Run) -> float | None:
    """Tokens per second while the batch is at its steady size."""
    if not measured.get("period_ms"):
        return None
    return float(1e3 * measured["batch"] / measured["period_ms"])


def summarise_case(
    rounds: Mapping[str, Sequence[Run]], workload: Workload
) -> dict[str, dict[str, Any]]:
    """Everything that a report shows of one case, with the raw runs."""
    variants: dict[str, Any] = {}
    for name, runs in rounds.items():
        metrics = {}
        for metric, of in METRICS.items():
            values = [value for run in runs if (value := of(run)) is not None]
            if len(values) == len(runs):
                metrics[metric] = spread(values)
        variants[name] = {
            "text": VARIANTS[name].text,
            "metrics": metrics,
            "ranks": _per_rank(runs),
            "memory": _memory(runs[-1], workload),
            "plan": _plan(runs[-1]),
            "rounds": [_raw(run) for run in runs],
        }
    return {
        "variants": variants,
        "ratios": {
            base: _against(rounds, base) for base in ("stock", "full", BASE) if base in rounds
        },
        "balancing": {
            name: _balancing(rounds[BASE], runs)
            for name, runs in rounds.items()
            if BASE in rounds and name != BASE and VARIANTS[name].has_budget
        },
    }


def _against(rounds: Mapping[str, Sequence[Run]], base: str) -> dict[str, Any]:
    """Paired ratios of all variants to one, by metric."""
    table: dict[str, Any] = {}
    for metric in COMPARED:
        of = METRICS[metric]
        known = {
            name: values
            for name, runs in rounds.items()
            if None not in (values := [of(run) for run in runs])
        }
        if base in known:
            table[metric] = {
                name: ratios(values, known[base])  # type: ignore[arg-type]
                for name, values in known.items()
                if name != base
            }
    return table


def _balancing(base: Sequence[Run], runs: Sequence[Run]) -> dict[str, Any]:
    """Speed-up of the decode step over the base, and what the base's imbalance allows.

    ``reached`` is speed-up over allowed speed-up; ``reached_gain`` the same of what exceeds 1. The
    ``cpu_`` figures are made from processor time alone: slowest rank of the base over slowest rank
    of the variant, allowed: slowest over mean rank of the base. They leave communication and
    other processes out.
    """
    pairs = [
        (old["measured"], new["measured"])
        for old, new in zip(base, runs, strict=True)
        if old["measured"].get("period_ms") and new["measured"].get("period_ms")
    ]
    if not pairs:
        return {}
    speedup = [old["period_ms"] / new["period_ms"] for old, new in pairs]
    allowed = [old["allowed_speedup"] for old, _ in pairs]
    cpu = [old["cpu_slowest_ms"] / new["cpu_slowest_ms"] for old, new in pairs]
    cpu_allowed = [old["cpu_imbalance"] for old, _ in pairs]
    values = {
        "speedup": speedup,
        "allowed": allowed,
        "reached": [a / b for a, b in zip(speedup, allowed, strict=True)],
        "cpu_speedup": cpu,
        "cpu_allowed": cpu_allowed,
        "cpu_reached": [a / b for a, b in zip(cpu, cpu_allowed, strict=True)],
    }
    result: dict[str, Any] = {key: spread(value) for key, value in values.items()}
    for kind in ("", "cpu_"):
        gain, possible = (result[kind + key]["median"] - 1 for key in ("speedup", "allowed"))
        # None where hardly any is possible
        result[kind + "reached_gain"] = gain / possible if possible > 0.01 else None
    return result


def _per_rank(runs: Sequence[Run]) -> dict[str, list[float]]:
    table = {}
    for key in PER_RANK:
        lists = [run["measured"][key] for run in runs if key in run["measured"]]
        if len(lists) == len(runs):
            table[key] = [statistics.median(values) for values in zip(*lists, strict=True)]
    return table


def _memory(run: Run, workload: Workload) -> dict[str, Any]:
    """KV memory at the peak of the last run; bytes over all ranks.

    ``page_overhead``: pages held over the tokens in them, with all requests at their full length,
    known when all of them ran at once.
    """
    state = run.get("fairkv")
    if not state:
        return {"slots": run.get("max_total_tokens")}
    ranks = state["ranks"]
    pages = sum(rank["peak_pages_charged"] for rank in ranks)
    requests = max(rank["peak_requests"] for rank in ranks)
    result = {
        "total_bytes": sum(rank["total_bytes"] for rank in ranks),
        "pool_bytes": sum(rank["pool_bytes"] for rank in ranks),
        "page_bytes": sum(rank["peak_pages_charged"] * rank["page_bytes"] for rank in ranks),
        "rank_pages": [rank["peak_pages_charged"] for rank in ranks],
        "arena_pages": [rank["pages"] for rank in ranks],
        "requests": requests,
    }
    kept = state["kept"]
    if requests == workload.prompts and kept["prompts"]:
        lanes = len(kept["tokens"]) * len(kept["tokens"][0])
        mean_kept = sum(map(sum, kept["tokens"])) / kept["prompts"]
        tokens = requests * (mean_kept + lanes * (workload.output_length - 1))
        result["page_overhead"] = pages * PAGE_TOKENS / tokens
    return result


def _plan(run: Run) -> dict[str, Any]:
    state = run.get("fairkv")
    if not state:
        return {}
    planned = state["planned"].get("token_imbalance")
    return {
        "placement": state["placement"],
        "scope": state["scope"],
        "budget": state["budget"],
        "copies": state["copies"],
        "planned_balancedness": 1 / planned if planned else None,
        "lanes": [rank["lanes"] for rank in state["ranks"]],
        "home_rows": state["planned"].get("home_rows"),
        "decisions_agree": state["decisions_agree"],
    }


def _raw(run: Run) -> dict[str, Any]:
    """A run without what is the same in each (the plan) and per-request lists."""
    return {key: value for key, value in run.items() if key not in ("fairkv", "ttft", "itl")}

# SPDX-License-Identifier: Apache-2.0
"""From the raw runs of a case to figures: medians, spreads, ratios, and how much balancing gave."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fairkv_sglang.bench.engine.settings import BASE, VARIANTS, EngineSettings
from fairkv_sglang.bench.stats import Spread, ratios, spread
from fairkv_sglang.kernels import PAGE_TOKENS

FORMAT, VERSION = "fairkv-bench", 2

Run = Mapping[str, Any]
Rounds = Mapping[str, Sequence[Run]]


def _of_measured(key: str) -> Callable[[Run], float | None]:
    return lambda run: run["measured"].get(key)


def _median(values: Sequence[float], scale: float = 1.0) -> float | None:
    return scale * statistics.median(values) if values else None


def _tail(values: Sequence[float]) -> float | None:
    """The 99th percentile (of fewer than 100 values: the largest)."""
    return sorted(values)[max(0, -(-99 * len(values) // 100) - 1)] if values else None


def _own_prefill(run: Run) -> float | None:
    """Seconds of prefill passes before anything of FairKV's, on the rank where they are most."""
    passes = run["measured"].get("prefill_s", [])
    spent = (run.get("prefill") or {}).get("compress_seconds", [0.0] * len(passes))
    return max((a - b for a, b in zip(passes, spent, strict=True)), default=None)


def _compress_percent(run: Run) -> float | None:
    """Scoring, selection and handing over, in % of prefill; of the rank where it is most."""
    prefill = run.get("prefill")
    if not prefill:
        return None
    pairs = zip(prefill["compress_seconds"], prefill["prefill_seconds"], strict=True)
    return max((100 * part / whole for part, whole in pairs if whole > 0), default=None)


def _per_prompt(
    run: Run, key: str, over_ranks: Callable[[Sequence[float]], float], scale: float
) -> float | None:
    """A figure of the hand-over for one prompt."""
    prefill = run.get("prefill")
    return over_ranks(prefill[key]) * scale / run["requests"] if prefill else None


METRICS: dict[str, Callable[[Run], float | None]] = {
    "output_tokens_per_s": lambda run: run["output_tokens"] / run["seconds"],
    "seconds": lambda run: run["seconds"],
    "ttft_s": lambda run: _median(run["ttft"]),
    "ttft_p99_s": lambda run: _tail(run["ttft"]),
    "itl_ms": lambda run: _median(run["itl"], 1e3),
    "retractions": lambda run: run["retractions"],
    "prefill_s": lambda run: max(run["measured"].get("prefill_s", []), default=None),
    "prefill_own_s": _own_prefill,
    "compress_percent": _compress_percent,
    "hand_over_mb_per_prompt": lambda run: _per_prompt(run, "hand_over_bytes", sum, 1e-6),
    "hand_over_ms_per_prompt": lambda run: _per_prompt(run, "hand_over_seconds", max, 1e3),
    "peak_requests": _of_measured("peak_batch"),
    "decode_period_ms": _of_measured("period_ms"),
    **{
        key: _of_measured(key)
        for key in (
            "communication_ms", "imbalance", "allowed_speedup", "cpu_slowest_ms", "cpu_even_ms",
            "cpu_imbalance", "balancedness",
        )
    },
}  # fmt: skip
"""Figures of one run; None where a variant or device has none."""

PER_RANK = ("waiting_ms", "compute_ms", "cpu_ms", "rank_tokens")
"""Lists by rank in the ranks' measurements; medians over rounds are reported."""

COMPARED = ("output_tokens_per_s", "ttft_s", "prefill_s", "prefill_own_s")
"""Metrics whose ratios to a base are shown; of times the lower is the better one."""
BASES = ("stock", "full", BASE)


def summarise_case(rounds: Rounds, settings: EngineSettings) -> dict[str, dict[str, Any]]:
    """Everything that a report shows of one case, with the raw runs."""
    metrics = {name: _metrics(runs) for name, runs in rounds.items()}
    return {
        "variants": {
            name: {
                "text": VARIANTS[name].text,
                "metrics": {metric: spread(values) for metric, values in metrics[name].items()},
                "ranks": _per_rank(runs),
                "memory": _memory(runs[-1], settings),
                "plan": _plan(runs[-1]),
                "rounds": [_raw(run) for run in runs],
            }
            for name, runs in rounds.items()
        },
        "ratios": {
            base: {
                metric: {
                    name: ratios(found[metric], metrics[base][metric])
                    for name, found in metrics.items()
                    if name != base and metric in found
                }
                for metric in COMPARED
                if metric in metrics[base]
            }
            for base in BASES
            if base in rounds
        },
        "balancing": {
            name: _balancing(rounds[BASE], runs)
            for name, runs in rounds.items()
            if BASE in rounds and name != BASE and VARIANTS[name].has_budget
        },
    }


def _metrics(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Metrics that every round has."""
    found = {metric: [of(run) for run in runs] for metric, of in METRICS.items()}
    return {
        metric: [value for value in values if value is not None]
        for metric, values in found.items()
        if None not in values
    }


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
    result: dict[str, Any] = {}
    for kind, time, possible in (
        ("", "period_ms", "allowed_speedup"), ("cpu_", "cpu_slowest_ms", "cpu_imbalance")
    ):  # fmt: skip
        allowed = [old[possible] for old, _ in pairs]
        speedup = [old[time] / new[time] for old, new in pairs]
        found: dict[str, Spread] = {
            "speedup": spread(speedup),
            "allowed": spread(allowed),
            "reached": ratios(speedup, allowed),
        }
        gain, most = (found[key]["median"] - 1 for key in ("speedup", "allowed"))
        result |= {kind + key: value for key, value in found.items()}
        # None where hardly any is possible
        result[kind + "reached_gain"] = gain / most if most > 0.01 else None
    return result


def _per_rank(runs: Sequence[Run]) -> dict[str, list[float]]:
    table = {}
    for key in PER_RANK:
        lists = [run["measured"][key] for run in runs if key in run["measured"]]
        if len(lists) == len(runs):
            table[key] = [statistics.median(values) for values in zip(*lists, strict=True)]
    return table


def _memory(run: Run, settings: EngineSettings) -> dict[str, Any]:
    """KV memory at the peak of the last run; bytes over all ranks.

    ``page_overhead``: pages held over the tokens in them, with all requests at their full length,
    known when all of them ran at once.
    """
    state = run.get("fairkv")
    if not state:
        return {"slots": run.get("max_total_tokens")}
    ranks, kept = state["ranks"], state["kept"]
    pages = [rank["peak_pages_charged"] for rank in ranks]
    requests = max(rank["peak_requests"] for rank in ranks)
    result = {
        "total_bytes": sum(rank["total_bytes"] for rank in ranks),
        "pool_bytes": sum(rank["pool_bytes"] for rank in ranks),
        "page_bytes": sum(n * rank["page_bytes"] for n, rank in zip(pages, ranks, strict=True)),
        "rank_pages": pages,
        "requests": requests,
    }
    if requests == settings.prompts and kept["prompts"]:
        lanes = len(kept["tokens"]) * len(kept["tokens"][0])
        mean_kept = sum(map(sum, kept["tokens"])) / kept["prompts"]
        tokens = requests * (mean_kept + lanes * (settings.output_len - 1))
        result["page_overhead"] = sum(pages) * PAGE_TOKENS / tokens
    return result


def _plan(run: Run) -> dict[str, Any]:
    state = run.get("fairkv")
    if not state:
        return {}
    planned = state["planned"].get("token_imbalance")
    return {
        **{key: state[key] for key in ("placement", "scope", "budget", "copies")},
        "planned_balancedness": 1 / planned if planned else None,
        "lanes": [rank["lanes"] for rank in state["ranks"]],
        "home_rows": state["planned"].get("home_rows"),
        "decisions_agree": state["decisions_agree"],
    }


def _raw(run: Run) -> dict[str, Any]:
    """A run without what is the same in each (the plan) and lists by request."""
    left_out = ("fairkv", "ttft", "itl", "outputs", "looks")
    return {key: value for key, value in run.items() if key not in left_out}

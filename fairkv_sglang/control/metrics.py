# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of a rank, in SGLang's naming and with its labels."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from fairkv_sglang.runtime import FairKVRuntime


class Metric(NamedTuple):
    """Name without the counter's ``_total``, kind, help text."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str


METRICS: tuple[Metric, ...] = (
    Metric("head_pages_used", "gauge", "Head pages charged to requests on this rank."),
    Metric("head_pages_total", "gauge", "Head pages of this rank's arena."),
    Metric("rank_load_tokens", "gauge", "Tokens that a decode step of this rank reads now."),
    Metric(
        "balancedness",
        "gauge",
        "Mean over max of what the ranks read in a decode step, layer by layer; 1 is perfect.",
    ),
    Metric("balancedness_planned", "gauge", "The same as the plan expects it."),
    Metric("running_requests", "gauge", "Requests that hold head pages."),
    Metric("kept_tokens", "counter", "Tokens kept of prompts, over all layers and heads."),
    Metric("prompt_tokens", "counter", "Tokens of the prompts that were compressed."),
    Metric("compressions", "counter", "Prompts that were compressed."),
    Metric("retractions", "counter", "Requests that were admitted again after a retraction."),
    Metric("replans", "counter", "Plans adopted while serving."),
    Metric("lane_weight_bytes", "counter", "Bytes of weights brought to this rank by new plans."),
    Metric("handed_over_bytes", "counter", "Bytes of kept rows that left this rank."),
)

PREFIX = "sglang:fairkv_"


def read(runtime: FairKVRuntime) -> dict[str, float]:
    """Present value of every metric, by name."""
    book, rank = runtime.book, runtime.heads.rank
    replanner = runtime.replanner
    return {
        "head_pages_used": int(book.ledger.held[rank]),
        "head_pages_total": int(book.ledger.capacity[rank]),
        "rank_load_tokens": int(book.residents.reads[:, rank].sum()),
        "balancedness": book.residents.balancedness(),
        "balancedness_planned": runtime.planned_balancedness,
        "running_requests": book.live_requests,
        "kept_tokens": int(book.kept_sum.sum()),
        "prompt_tokens": book.kept_prompt_tokens,
        "compressions": book.kept_prompts,
        "retractions": book.readmitted,
        "replans": replanner.adopted if replanner else 0,
        "lane_weight_bytes": runtime.twins.bytes_brought if runtime.twins else 0,
        "handed_over_bytes": runtime.hand_over_bytes,
    }


class Exporter:
    """The metrics of this rank; created after SGLang has set up Prometheus for its processes.

    Args:
        labels: SGLang's labels of the rank.
    """

    def __init__(self, labels: dict[str, str]) -> None:
        from prometheus_client import Counter, Gauge

        self._gauges: dict[str, Any] = {}
        self._counters: dict[str, Any] = {}
        self._counted: dict[str, float] = {}
        for name, kind, text in METRICS:
            names = list(labels)
            if kind == "gauge":
                gauge = Gauge(PREFIX + name, text, names, multiprocess_mode="mostrecent")
                self._gauges[name] = gauge.labels(**labels)
            else:
                self._counters[name] = Counter(PREFIX + name, text, names).labels(**labels)
                self._counted[name] = 0.0

    def update(self, runtime: FairKVRuntime) -> None:
        """Bring all metrics up to the present state."""
        values = read(runtime)
        for name, gauge in self._gauges.items():
            gauge.set(values[name])
        for name, counter in self._counters.items():
            counter.inc(values[name] - self._counted[name])
            self._counted[name] = values[name]

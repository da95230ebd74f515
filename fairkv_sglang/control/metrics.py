# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of a rank, in SGLang's naming and with its labels."""

from __future__ import annotations

import time
from typing import Any, Literal, NamedTuple

from fairkv_sglang.control.server_info import RankReport


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
    Metric("spills", "counter", "Prompts that kept more than was charged, a retraction each."),
    Metric("output_compressions", "counter", "Times that a request was compressed as it wrote."),
    Metric("output_pages_freed", "counter", "Head pages that this gave back on this rank."),
    Metric("replans", "counter", "Plans adopted while serving."),
    Metric("lane_weight_bytes", "counter", "Bytes of weights brought to this rank by new plans."),
    Metric("handed_over_bytes", "counter", "Bytes of kept rows that left this rank."),
)

PREFIX = "sglang:fairkv_"
REFRESH_SECONDS = 1.0


def read(report: RankReport) -> dict[str, float]:
    """Present value of every metric, by name."""
    book, replanner, twins = report.book, report.replanner, report.twins
    rank, outputs = book.heads.rank, book.outputs
    return {
        "head_pages_used": int(book.ledger.held[rank]),
        "head_pages_total": int(book.ledger.capacity[rank]),
        "rank_load_tokens": int(book.residents.reads[:, rank].sum()),
        "balancedness": book.residents.balancedness(),
        "balancedness_planned": report.in_force.balancedness,
        "running_requests": book.live_requests,
        "kept_tokens": int(book.kept_sum.sum()),
        "prompt_tokens": book.kept_prompt_tokens,
        "compressions": book.kept_prompts,
        "retractions": book.readmitted,
        "spills": book.charges.spills,
        "output_compressions": outputs.compressions if outputs else 0,
        "output_pages_freed": int(outputs.freed_pages[rank]) if outputs else 0,
        "replans": replanner.adopted if replanner else 0,
        "lane_weight_bytes": twins.bytes_brought,
        "handed_over_bytes": report.hand_over.bytes_sent,
    }


class Exporter:
    """The metrics of this rank; created after SGLang has set up Prometheus for its processes.

    Args:
        report: What there is to say of the rank.
        labels: SGLang's labels of the rank.
    """

    def __init__(self, report: RankReport, labels: dict[str, str]) -> None:
        from prometheus_client import Counter, Gauge

        self._report = report
        self._refreshed = -REFRESH_SECONDS
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

    def update(self) -> None:
        """Bring all metrics up to the present state, once a second.

        Every rank does so before its passes and at idle: SGLang logs its own statistics on the
        first rank alone.
        """
        now = time.monotonic()
        if now < self._refreshed + REFRESH_SECONDS:
            return
        self._refreshed = now
        values = read(self._report)
        for name, gauge in self._gauges.items():
            gauge.set(values[name])
        for name, counter in self._counters.items():
            counter.inc(values[name] - self._counted[name])
            self._counted[name] = values[name]

# SPDX-License-Identifier: Apache-2.0
"""From records to a table: accuracy by mode, task and length, against another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from fairkv_sglang.evaluation.run import Record
from fairkv_sglang.evaluation.statistics import (
    agreement,
    divergence,
    same_tokens,
    sign_test,
    wilson,
)

Cell = dict[str, Any]
ALL = "all"


def summarise(records: Sequence[Record], baseline: Sequence[Record] | None = None) -> list[Cell]:
    """One cell for each mode, task and length that occur, then one for all of a mode.

    A cell has ``mode``, ``task``, ``tokens`` (None: all), ``count``, ``right``, ``accuracy`` with
    its 95 % ``interval``, mean ``score`` and mean ``answer_tokens``. With a baseline, for the
    samples that both runs have: ``pairs``, ``lost`` and ``won`` samples, the chance ``p`` of such a
    difference, ``agreement`` of the answers' tokens, ``identical`` answers, and ``kl``, mean nats
    of the tokens up to the first that differs (None without the log probabilities of both).

    Raises:
        ValueError: The runs have no sample in common.
    """
    other = {record.key: record for record in baseline or ()}
    if baseline is not None and not any(record.key in other for record in records):
        raise ValueError(
            "the baseline has none of this run's samples: give the same tasks and seed"
        )
    cells = []
    for mode in dict.fromkeys(record.mode for record in records):
        of_mode = [record for record in records if record.mode == mode]
        kinds = dict.fromkeys((record.task, record.tokens) for record in of_mode)
        for task, tokens in kinds:
            part = [record for record in of_mode if (record.task, record.tokens) == (task, tokens)]
            cells.append(_cell(mode, task, tokens, part, other))
        if len(kinds) > 1:
            cells.append(_cell(mode, ALL, None, of_mode, other))
    return cells


def _cell(
    mode: str,
    task: str,
    tokens: int | None,
    records: Sequence[Record],
    other: dict[tuple[str, str], Record],
) -> Cell:
    right = sum(record.right for record in records)
    cell: Cell = {
        "mode": mode,
        "task": task,
        "tokens": tokens,
        "count": len(records),
        "right": right,
        "accuracy": right / len(records),
        "interval": wilson(right, len(records)),
        "score": fmean(record.score for record in records),
        "answer_tokens": fmean(len(record.answer_tokens) for record in records),
    }
    pairs = [(other[record.key], record) for record in records if record.key in other]
    if pairs:
        lost = sum(a.right and not b.right for a, b in pairs)
        won = sum(b.right and not a.right for a, b in pairs)
        distances = [value for a, b in pairs for value in _divergences(a, b)]
        cell |= {
            "pairs": len(pairs),
            "lost": lost,
            "won": won,
            "p": sign_test(lost, won),
            "agreement": fmean(agreement(a.answer_tokens, b.answer_tokens) for a, b in pairs),
            "identical": fmean(a.answer_tokens == b.answer_tokens for a, b in pairs),
            "kl": fmean(distances) if distances else None,
        }
    return cell


def _divergences(full: Record, other: Record) -> list[float]:
    """At each token that both answers decided after the same ones."""
    if not full.top or not other.top:
        return []
    length = same_tokens(full.answer_tokens, other.answer_tokens) + 1
    pairs = zip(full.top[:length], other.top[:length], strict=False)
    return [divergence(a, b) for a, b in pairs]


LEGEND = {
    "right": "samples with every check passed, and the 95 % interval (Wilson)",
    "lost, won": "samples that only the baseline, only this run has right; p: by chance (McNemar)",
    "same": "mean share of an answer's tokens before it parts from the baseline's",
    "KL": "nats a token, a lower bound from the most probable tokens",
}
_COLUMNS: tuple[tuple[str, Callable[[Cell], str]], ...] = (
    ("mode", lambda c: str(c["mode"])),
    ("task", lambda c: str(c["task"])),
    ("tokens", lambda c: str(c["tokens"] or "")),
    ("samples", lambda c: str(c["count"])),
    ("right", lambda c: f"{c['accuracy']:.0%} [{c['interval'][0]:.0%}..{c['interval'][1]:.0%}]"),
    ("checks", lambda c: f"{c['score']:.0%}"),
    ("answer", lambda c: f"{c['answer_tokens']:.1f}"),
    ("lost", lambda c: str(c.get("lost", ""))),
    ("won", lambda c: str(c.get("won", ""))),
    ("p", lambda c: f"{c['p']:.3f}" if "p" in c else ""),
    ("same", lambda c: f"{c['agreement']:.0%}" if "agreement" in c else ""),
    ("KL", lambda c: f"{c['kl']:.3f}" if c.get("kl") is not None else ""),
)


def table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]], dict[str, str]]:
    """Columns, rows and legend for people."""
    compared = any("pairs" in cell for cell in cells)
    columns = _COLUMNS if compared else _COLUMNS[:7]
    legend = {name: text for name, text in LEGEND.items() if compared or name == "right"}
    rows = [[show(cell) for _, show in columns] for cell in cells]
    return [name for name, _ in columns], rows, legend

# SPDX-License-Identifier: Apache-2.0
"""A run: samples, their answers in a file of lines, and what is left to ask."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from fairkv_sglang.evaluation.client import Answer, Client, Mode
from fairkv_sglang.evaluation.tasks import Sample

FORMAT = "fairkv-eval"


@dataclass(frozen=True)
class Record:
    """One answer, as it stands in the file.

    Attributes:
        id, task, tokens: The sample's.
        mode: ``aware`` or ``agnostic``.
        score: Share of the checks that passed; 1.0 is right.
        text, answer_tokens, top, prompt_tokens: The answer's.
    """

    id: str
    task: str
    tokens: int
    mode: str
    score: float
    text: str
    answer_tokens: list[str]
    top: list[dict[str, float]] | None
    prompt_tokens: int

    @property
    def right(self) -> bool:
        """Whether all checks passed."""
        return self.score == 1.0

    @property
    def key(self) -> tuple[str, str]:
        """The same for the same question in another run."""
        return self.mode, self.id


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Settings and records of a file; a line that was cut off by the end of its run is left out.

    Raises:
        ValueError: in one line, for a file of something else.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        head = json.loads(lines[0])
        settings: dict[str, Any] = head[FORMAT]
    except (ValueError, KeyError, TypeError, IndexError):
        raise ValueError(f"{path} is not a file of fairkv eval") from None
    records = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError):
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a record of fairkv eval") from None
    return settings, records


def run(
    client: Client,
    samples: Sequence[Sample],
    modes: Iterable[Mode],
    path: Path,
    settings: dict[str, Any],
    parallel: int,
    done: Callable[[], None],
) -> list[Record]:
    """Ask what is not in the file yet and add it line by line.

    Args:
        client: The server.
        samples: In an order in which those of one context are neighbours.
        modes: Each for all samples.
        path: The file; begun with ``settings`` if it is not there.
        settings: What decides the questions; those of a file that is there must be the same.
        parallel: Contexts that are asked about at once; questions about one follow each other, so
            that its cached prefix is found.
        done: Called for each question that has its answer.

    Raises:
        ValueError: in one line: other settings, or the server's trouble; answers so far are kept.
    """
    records: list[Record] = []
    if path.exists() and path.stat().st_size:
        before, records = read(path)
        for name in settings.keys() | before.keys():
            old, new = before.get(name), settings.get(name)
            if old != new:
                raise ValueError(
                    f"{path} was made with {name} {old}, not {new}: give another file, or the "
                    "same settings to go on"
                )
    _rewrite(path, settings, records)
    known = {record.key for record in records}
    left = [(mode, s) for mode in modes for s in samples if (mode, s.id) not in known]
    for _ in records:
        done()
    groups = [list(g) for _, g in groupby(left, key=lambda item: (item[0], item[1].context))]
    lock = threading.Lock()
    with path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(parallel) as pool:

        def one(group: list[tuple[Mode, Sample]]) -> None:
            for mode, sample in group:
                record = _record(sample, mode, client.ask(sample, mode))
                with lock:
                    records.append(record)
                    file.write(json.dumps(asdict(record)) + "\n")
                    file.flush()
                    done()

        futures = [pool.submit(one, group) for group in groups]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
    return records


def _rewrite(path: Path, settings: dict[str, Any], records: list[Record]) -> None:
    """The file with whole lines only."""
    lines = [json.dumps({FORMAT: settings}), *(json.dumps(asdict(r)) for r in records)]
    fresh = path.with_suffix(".part")
    fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
    fresh.replace(path)


def _record(sample: Sample, mode: Mode, answer: Answer) -> Record:
    return Record(
        id=sample.id,
        task=sample.task,
        tokens=sample.tokens,
        mode=mode,
        score=sample.score(answer.text),
        text=answer.text,
        answer_tokens=answer.tokens,
        top=answer.top,
        prompt_tokens=answer.prompt_tokens,
    )

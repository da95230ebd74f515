# SPDX-License-Identifier: Apache-2.0
"""What sub-commands print: tables for people (also in a pipe), JSON, progress on stderr."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

PIPE_WIDTH = 140
PICTURES = (".png", ".svg", ".pdf")


def add_fields(parser: argparse.ArgumentParser, model: type[BaseModel]) -> None:
    """A flag for each field of ``model``; those not given leave no trace, as for :func:`given`.

    Values are strings here: the model parses and checks them.
    """
    for name, field in model.model_fields.items():
        text = f"{field.description}" + (f"; default {field.default}" if field.default else "")
        kind: dict[str, Any] = {"action": "store_true"} if field.annotation is bool else {}
        if not kind:
            kind = {"metavar": "X" if field.annotation is float else "N"}
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **kind
        )


def given(args: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    """The fields of ``model`` that the command line gives."""
    return {name: value for name, value in vars(args).items() if name in model.model_fields}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command, which ends as a filter does; rich's own exits with 1."""
        raise BrokenPipeError


def console() -> Console:
    """Console on stdout; a fixed width and no colour where stdout is not a terminal."""
    return _Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    legend: Mapping[str, str] | None = None,
) -> None:
    """A table with the first column left and all others right; below it what columns mean."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console().print(table)
    for name, meaning in (legend or {}).items():
        print(f"  {name}: {meaning}")


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, indent=1, allow_nan=False))


def check_output(path: Path, endings: tuple[str, ...]) -> None:
    """Raises ValueError, in one line, unless a file of one of these endings can be written there.

    For before the work: minutes of measuring are not to be lost to a mistyped path.
    """
    if path.suffix not in endings:
        names = " or ".join(filter(None, (", ".join(endings[:-1]), endings[-1])))
        raise ValueError(f"{path}: name it {names}")
    folder = path.parent
    if path.is_dir() or not folder.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {folder}"
        raise ValueError(f"cannot write {path}: {what}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"cannot write {path}: no permission")


@contextlib.contextmanager
def progress(text: str, total: int) -> Iterator[Any]:
    """A progress bar on stderr, gone when done; silent where stderr is not a terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Keep C code off stdout: some HiGHS builds print debug lines that would spoil JSON."""
    sys.stdout.flush()
    try:
        number = sys.stdout.fileno()
        saved = os.dup(number)
    except (OSError, ValueError, AttributeError):  # stdout has been replaced, as in tests
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, number)
        yield
    finally:
        os.dup2(saved, number)
        os.close(saved)
        os.close(null)

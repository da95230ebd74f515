# SPDX-License-Identifier: Apache-2.0
"""What each budget costs in answers: the table and picture of ``docs/accuracy.md``.

    python -m fairkv_sglang.bench.accuracy --model small      the repository's model, its own task
    python -m fairkv_sglang.bench.accuracy --model smollm2    SmolLM2, the tasks of `fairkv eval`

Starts a server of stock SGLang for the full cache and one of FairKV for each method and scope,
which is asked with each kept share in turn (an option of its requests), runs `fairkv eval` on it,
and compares sample by sample with the full cache. Answers are kept in ``build/accuracy``: an
interrupted run goes on, a finished one asks nothing, and the table has whatever runs are there.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairkv_sglang.bench.stats import machine, write
from fairkv_sglang.budgets.scorers import SCORERS
from fairkv_sglang.cli.main import main as fairkv
from fairkv_sglang.evaluation.picture import draw
from fairkv_sglang.evaluation.run import read
from fairkv_sglang.evaluation.summary import Cell, summarise
from fairkv_sglang.evaluation.tasks import Check, Sample, write_samples

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # behind everything else; `demo` is a folder of the checkout
from demo.models import MODELS  # type: ignore[import-not-found]  # noqa: E402
from demo.prompts import (  # type: ignore[import-not-found]  # noqa: E402
    QUESTION_TOKENS,
    draw_facts,
    make_notes,
    to_text,
)

PAGE = ROOT / "docs" / "accuracy.md"
START_SECONDS = 300.0
CACHE_TOKENS = 131072
"""Tokens of the prefix cache: all contexts, so that most methods read each of them once."""
FULL = "full"


@dataclass(frozen=True)
class Defaults:
    """How a model is served, and what it is asked (``fairkv eval``)."""

    tp: int
    dtype: str
    samples: int
    lengths: tuple[int, ...]
    tasks: str = ""
    """Empty: the model's own task."""


DEFAULTS = {
    "small": Defaults(tp=2, dtype="float32", samples=100, lengths=(1024,)),
    "smollm2": Defaults(
        tp=1, dtype="bfloat16", samples=16, lengths=(1024,), tasks="needle,queries"
    ),
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=tuple(DEFAULTS), default="small")
    parser.add_argument("--scorers", default=",".join(SCORERS), help="default: %(default)s")
    parser.add_argument("--scopes", default="uniform,layer", help="default: %(default)s")
    parser.add_argument("--shares", default="0.5,0.25,0.125", help="default: %(default)s")
    parser.add_argument("--tp", type=int, help="tensor-parallel ranks")
    parser.add_argument("--samples", type=int, help="questions of each task")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "accuracy")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers end with this process
    defaults = DEFAULTS[args.model]
    tp, samples = args.tp or defaults.tp, args.samples or defaults.samples
    folder = args.folder / f"{args.model}-tp{tp}-{samples}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--samples", str(samples), "--lengths", ",".join(map(str, defaults.lengths))]
    if defaults.tasks:
        flags += ["--tasks", defaults.tasks]
    else:
        own = folder / "codes.jsonl"
        write_samples(own, [code_sample(i, n) for n in defaults.lengths for i in range(samples)])
        flags += ["--own", str(own)]
    shares = [float(share) for share in args.shares.split(",")]
    measure(args.model, tp, [], {FULL: {}}, flags, folder)
    for scorer, scope in itertools.product(args.scorers.split(","), args.scopes.split(",")):
        runs = {f"{scorer}-{scope}-{share:g}": {"ratio": share} for share in shares}
        server_flags = ["--fairkv", "--fairkv-scorer", scorer, "--fairkv-scope", scope]
        measure(args.model, tp, server_flags, runs, flags, folder)
    full = read(folder / f"{FULL}.jsonl")[1]
    cells = {
        name: summarise(read(folder / f"{name}.jsonl")[1], None if name == FULL else full)
        for name in sorted((path.stem for path in folder.glob("*.done")), key=_order)
    }
    name = f"accuracy-{args.model}-tp{tp}"
    results = ROOT / "docs" / "results"
    said = {"command": " ".join(sys.argv[1:]), "machine": machine("cpu"), "cells": cells}
    write(said, results, name)
    draw(cells, results / f"{name}.png")
    update_page(args.model, markdown(cells))
    return 0


def code_sample(number: int, tokens: int, facts: int = 8) -> Sample:
    """A code to recall in the small model's own words, cut between notes and question."""
    rng = random.Random(f"accuracy {number} {tokens} {facts}")
    notes = make_notes(rng, tokens - QUESTION_TOKENS, draw_facts(rng, facts))
    asked = notes.facts[0]
    code = to_text(asked.code)
    return Sample(
        id=f"codes/{tokens}/{number}",
        task="codes",
        tokens=tokens,
        context=to_text(notes.token_ids),
        question=" " + to_text(asked.question()),
        checks=(Check("exact", code),),
        new_tokens=len(asked.code) + 2,
        verbatim=True,
    )


def measure(
    model: str,
    tp: int,
    server_flags: list[str],
    runs: dict[str, dict[str, Any]],
    flags: list[str],
    folder: Path,
) -> None:
    """Run `fairkv eval` once for each of ``runs`` on one server; SystemExit if something fails.

    Args:
        model, tp, server_flags: The server's.
        runs: FairKV's options of the requests, by the name of the run.
        flags: Of `fairkv eval`.
        folder: Where the answers go; runs that are finished there are left out.
    """
    left = {name: runs[name] for name in runs if not (folder / f"{name}.done").exists()}
    if not left:
        return
    with server(model, tp, server_flags, folder / f"{next(iter(left))}.log") as url:
        for name, options in left.items():
            words = ["eval", "--url", url, "--out", str(folder / f"{name}.jsonl"), *flags]
            if options:
                words += ["--options", json.dumps(options)]
            print(f"{name}:", flush=True)
            if fairkv(words):
                raise SystemExit(1)
            (folder / f"{name}.done").touch()


@contextlib.contextmanager
def server(model: str, tp: int, flags: list[str], log: Path) -> Iterator[str]:
    """The address of a server that runs for the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "launch.py"), "--model-path", str(MODELS[model].folder())]
    command += ["--tp", str(tp), "--device", "cpu", "--dtype", DEFAULTS[model].dtype]
    command += ["--max-total-tokens", str(CACHE_TOKENS), "--host", "127.0.0.1", "--port", str(port)]
    if flags:
        command += ["--enable-custom-logit-processor", *flags]
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log)
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url + "/health", timeout=60):
            return
        time.sleep(0.5)
    raise SystemExit(f"the server did not start, see {log}")


# -- page -----------------------------------------------------------------------------------------


def markdown(cells: dict[str, list[Cell]]) -> str:
    """A row for each run: all tasks together, query-aware and query-agnostic."""
    modes = ("aware", "agnostic")
    head = ["kept", "method, scope"]
    for mode in modes:
        head += [f"{mode}: right", "lost / won", "KL"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, of_run in cells.items():
        scorer, _, rest = name.partition("-")
        scope, _, share = rest.rpartition("-")
        row = [f"{float(share):.1%}" if share else "100 %", f"{scorer}, {scope}" if scope else FULL]
        for mode in modes:
            of_mode = [cell for cell in of_run if cell["mode"] == mode]
            row += _figures(of_mode[-1]) if of_mode else ["", "", ""]  # the last is of all tasks
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _order(run: str) -> tuple[bool, str, float]:
    """The full cache first, then methods by name, larger shares first."""
    method, _, share = run.rpartition("-")
    return run != FULL, method, -float(share) if method else 0.0


def _figures(cell: dict[str, Any]) -> list[str]:
    low, high = cell["interval"]
    right = f"{cell['accuracy']:.0%} [{low:.0%}..{high:.0%}] of {cell['count']}"
    if "pairs" not in cell:
        return [right, "", ""]
    kl = "" if cell["kl"] is None else f"{cell['kl']:.3f}"
    return [right, f"{cell['lost']} / {cell['won']}", kl]


def update_page(model: str, table: str) -> None:
    """Replace the table of a model in the page."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = f"<!-- table of {model} -->\n", "\n<!-- end -->"
    before, found, after = text.partition(start)
    if not found:
        raise SystemExit(f"{PAGE} has no line {start.strip()!r}")
    PAGE.write_text(before + start + table + end + after.partition(end)[2], encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

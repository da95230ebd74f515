# SPDX-License-Identifier: Apache-2.0
"""What each budget costs in answers: the table and picture of ``docs/accuracy.md``.

    python -m fairkv_sglang.bench.accuracy --model small      the repository's model, its own task
    python -m fairkv_sglang.bench.accuracy --model smollm2    SmolLM2, the tasks of `fairkv eval`

Starts a server of stock SGLang for the full cache and one of FairKV, whose requests name scorer,
scope and kept share (a scorer that has prompts repeated needs a server of its own), runs `fairkv
eval` with each of them, and compares sample by sample with the full cache. Answers are kept in
``build/accuracy``: an interrupted run goes on, a finished one asks nothing, and the table has
whatever runs are there.
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

from fairkv_sglang.bench.accuracy_table import FULL, MODES, Table, order, update_page
from fairkv_sglang.bench.accuracy_threshold import calibrated, kept, kept_since, options_above
from fairkv_sglang.bench.stats import machine, write
from fairkv_sglang.budgets.scorers import SCORERS
from fairkv_sglang.cli.main import main as fairkv
from fairkv_sglang.evaluation.run import read
from fairkv_sglang.evaluation.summary import Cell, summarise
from fairkv_sglang.evaluation.tasks import Check, Sample, write_samples

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # behind everything else; `demo` is a folder of the checkout
from demo.models import MODELS, DemoModel  # type: ignore[import-not-found]  # noqa: E402
from demo.prompts import (  # type: ignore[import-not-found]  # noqa: E402
    QUESTION_TOKENS,
    draw_facts,
    make_notes,
    to_text,
)

START_SECONDS = 900.0
CACHE_TOKENS = 131072
"""Tokens of the prefix cache: all contexts, so that most methods read each of them once."""
DECODE_TOKENS = 65536
"""Tokens of FairKV's head pages beside it."""
PARALLEL = 32
"""Questions at once: decode steps cost little more for many requests than for one."""
CALIBRATION = {"seed": 77, "count": 4, "tokens": 1024}
"""Prompts with questions by which thresholds are found; the runs' own are drawn otherwise."""
SHARED = "keydiff"
"""Scorer of the server that is asked for all others, but for those that have prompts repeated."""


@dataclass(frozen=True)
class Defaults:
    """How a model is served, and what it is asked (``fairkv eval``)."""

    tp: int
    dtype: str
    samples: int
    lengths: tuple[int, ...]
    scopes: str
    tasks: str = ""
    """Empty: the model's own task."""


DEFAULTS = {
    "small": Defaults(
        tp=2,
        dtype="float32",
        samples=100,
        lengths=(1024,),
        scopes="uniform,head,layer,model,pyramid,rank,threshold",
    ),
    "smollm2": Defaults(  # with one rank, scope `rank` is `layer`
        tp=1,
        dtype="bfloat16",
        samples=16,
        lengths=(1024,),
        scopes="uniform,head,layer,model,pyramid,threshold",
        tasks="needle,queries",
    ),
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=tuple(DEFAULTS), default="small")
    untrained = ",".join(name for name in SCORERS if not SCORERS[name].reads_hidden)
    parser.add_argument("--scorers", default=untrained, help="default: %(default)s")
    parser.add_argument("--scopes", help="default: what differs at the model's number of ranks")
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
    flags += ["--parallel", str(PARALLEL)]
    shares = [float(share) for share in args.shares.split(",")]
    scopes = (args.scopes or defaults.scopes).split(",")
    measure(args.model, tp, [], {FULL: {}}, flags, folder)
    by_server: dict[str, dict[str, dict[str, Any]]] = {}
    for scope, scorer, share in itertools.product(scopes, args.scorers.split(","), shares):
        # What repeats prompts needs a server that has it; naming its own scorer changes nothing.
        runs = by_server.setdefault(scorer if SCORERS[scorer].repeats else SHARED, {})
        runs[f"{scorer}-{scope}-{share:g}"] = {"scorer": scorer, "scope": scope, "ratio": share}
    for scorer, runs in by_server.items():
        fairkv_flags = ["--fairkv", "--fairkv-scorer", scorer]
        fairkv_flags += ["--fairkv-prefill-pool", str(CACHE_TOKENS)]
        fairkv_flags += ["--fairkv-profile", str(MODELS[args.model].profile)]
        measure(args.model, tp, fairkv_flags, runs, flags, folder)
    cells = read_cells(folder)
    name = f"accuracy-{args.model}-tp{tp}"
    results = ROOT / "docs" / "results"
    said = {"command": " ".join(sys.argv[1:]), "machine": machine("cpu"), "cells": cells}
    write(said, results, name)
    table = Table(cells)
    table.draw(results / f"{name}.png")
    update_page(args.model, table.markdown())
    return 0


def read_cells(folder: Path) -> dict[str, list[Cell]]:
    """The cells of each run that has ended, the full cache first."""
    full = read(folder / f"{FULL}.jsonl")[1]
    found = {}
    for name in sorted((path.stem for path in folder.glob("*.done")), key=order):
        cells = summarise(read(folder / f"{name}.jsonl")[1], None if name == FULL else full)
        shares = json.loads((folder / f"{name}.done").read_text() or "{}")
        for cell in cells:
            if shares.get(cell["mode"]) is not None:
                cell["kept"] = shares[cell["mode"]]
        found[name] = cells
    return found


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
            print(f"{name}:", flush=True)
            if options.get("scope") == "threshold":
                options = as_threshold(url, MODELS[model], options, folder / "thresholds.json")
            words = ["eval", "--url", url, "--out", str(folder / f"{name}.jsonl"), *flags]
            shares = ask_modes(url, words, options)
            (folder / f"{name}.done").write_text(json.dumps(shares))


def as_threshold(url: str, model: DemoModel, options: dict[str, Any], file: Path) -> dict[str, Any]:
    """Options of a run with a threshold in the place of its share."""
    questions = model.questions(model.folder(), facts=model.facts, **CALIBRATION)
    prompts = [question.input_ids for question in questions]
    above = calibrated(url, options["scorer"], options["ratio"], prompts, file)
    return options_above(options["scorer"], above)


def ask_modes(url: str, words: list[str], options: dict[str, Any]) -> dict[str, float | None]:
    """Run `fairkv eval` and say what share of its prompts was kept in each mode, if FairKV was."""
    if options:
        words = [*words, "--options", json.dumps(options)]
    shares: dict[str, float | None] = {}
    for number, mode in enumerate(MODES, start=1):
        before = kept(url) if options else None
        if fairkv([*words, "--modes", ",".join(MODES[:number])]):
            raise SystemExit(1)
        shares[mode] = kept_since(url, before) if before else None
    return shares


@contextlib.contextmanager
def server(model: str, tp: int, flags: list[str], log: Path) -> Iterator[str]:
    """The address of a server that runs for the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "launch.py"), "--model-path", str(MODELS[model].folder())]
    command += ["--tp", str(tp), "--device", "cpu", "--dtype", DEFAULTS[model].dtype]
    tokens = CACHE_TOKENS + (DECODE_TOKENS if flags else 0)
    command += ["--max-total-tokens", str(tokens), "--host", "127.0.0.1", "--port", str(port)]
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


if __name__ == "__main__":
    sys.exit(main())

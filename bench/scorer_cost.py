# SPDX-License-Identifier: Apache-2.0
"""What scorers cost before the first token: ``python -m fairkv_sglang.bench.scorer_cost``.

One engine for each scorer on the repository's model, with more positions than it was trained for.
Random prompts of each length are served one after the other, for one token each; engines take turns
and are frozen between them. Printed are the time to first token and the processor time of the ranks
for a prompt, and both over the first scorer's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from fairkv_sglang.bench.engine.process import EngineProcess
from fairkv_sglang.bench.stats import machine, ratios, rotated, show, spread

MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"
POSITIONS = 16384


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add(
        "--scorers", default="keydiff,kvzip", help="of FairKV; the others are compared to the first"
    )
    add("--lengths", default="1024,4096", help="prompt tokens")
    add("--prompts", type=int, default=1, help="of a round")
    add("--rounds", type=int, default=3)
    add("--tp", type=int, default=1, help="ranks")
    return parser.parse_args()


def longer(folder: Path) -> Path:
    """The model with more positions."""
    for file in MODEL.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": POSITIONS})
    )
    return folder


def start(scorer: str, model: Path, tp: int, folder: Path) -> EngineProcess:
    """An engine, frozen."""
    options = {
        "fairkv": {"scorer": scorer, "ratio": 0.25},
        "engine": {
            "model_path": str(model), "tp_size": tp, "device": "cpu", "dtype": "float32",
            "max_total_tokens": 65536, "chunked_prefill_size": 2048, "random_seed": 1,
            "dist_timeout": 24 * 3600, "log_level": "warning",
        },
    }  # fmt: skip
    made = EngineProcess(folder / f"{scorer}.log", options, measure=False)
    made.freeze()
    return made


def processor_seconds(engine: EngineProcess) -> float:
    """Of all ranks so far."""
    ranks = psutil.Process(engine.process.pid).children(recursive=True)
    times = [rank.cpu_times() for rank in ranks if any("scheduler" in x for x in rank.cmdline())]
    return float(sum(each.user + each.system for each in times))


def measure(engine: EngineProcess, prompts: list[list[int]]) -> dict[str, float]:
    """Seconds of a prompt."""
    engine.thaw()
    before = processor_seconds(engine)
    served = engine.call("serve", prompts=prompts, new_tokens=[1] * len(prompts), at_once=1)
    used = processor_seconds(engine) - before
    engine.freeze()
    return {"first token": served["seconds"] / len(prompts), "processor": used / len(prompts)}


def main() -> None:
    """Measure and print."""
    args = parse()
    scorers = args.scorers.split(",")
    lengths = [int(length) for length in args.lengths.split(",")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runs: dict[tuple[int, str], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        print("starting engines", file=sys.stderr, flush=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "model").mkdir()
        model = longer(folder / "model")
        engines: dict[str, EngineProcess] = {}
        for scorer in scorers:
            engines[scorer] = start(scorer, model, args.tp, folder)
            stack.callback(engines[scorer].close)
        for engine in engines.values():
            measure(engine, np.random.default_rng(0).integers(8, 490, size=(2, 300)).tolist())
        for turn in range(args.rounds):
            for length in lengths:
                numbers = np.random.default_rng([turn, length])
                prompts: Any = numbers.integers(8, 490, size=(args.prompts, length)).tolist()
                for scorer in rotated(scorers, turn):
                    found = measure(engines[scorer], prompts)
                    print(f"{length} {scorer} {found}", file=sys.stderr, flush=True)
                    runs.setdefault((length, scorer), []).append(found)
    on = machine("cpu")
    print(
        f"TP {args.tp}, {args.rounds} rounds of {args.prompts} prompts, {on['cores']} cores, "
        f"load {on['load'][0]:.1f}, SGLang {on['sglang']}\n"
    )
    print("| tokens | scorer | first token s | over the first | processor s | over the first |")
    print("|---|---|---|---|---|---|")
    for (length, scorer), served in runs.items():
        cells = []
        for key in ("first token", "processor"):
            values = [run[key] for run in served]
            base = [run[key] for run in runs[length, scorers[0]]]
            cells += [show(spread(values)), show(ratios(values, base))]
        print(f"| {length:,} | `{scorer}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""``fairkv predict``: which prediction of the heads' loads would have served a trace best?

A trace is prompts one after the other. Again and again the mean of the next window is predicted
from what came before, a plan is made from it, and the next window's prompts are replayed on that.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.cli.output import print_json, print_table, progress
from fairkv_sglang.placement import Planner
from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.placement.planner import REQUEST_SPREAD
from fairkv_sglang.placement.requests import read_requests
from fairkv_sglang.placement.simulate import Traffic, simulate
from fairkv_sglang.profiles.predict import PREDICTORS, misplaced

_HEADS = 8  # of a made-up model
_LENGTHS = 0.5  # of prompts' lengths in every trace
_SCALE = 1024.0


@dataclass(frozen=True)
class Trace:
    """Kept tokens ``[N, L, H]`` of prompts in the order in which they come."""

    name: str
    kept: FloatArray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the sub-command."""
    parser.add_argument(
        "requests", nargs="*", help="kept tokens of requests (tangram's JSON); always: made-up ones"
    )
    parser.add_argument(
        "--predictors", default=",".join(PREDICTORS), help=f"default {','.join(PREDICTORS)}"
    )
    parser.add_argument("--tp", type=int, default=4, help="tensor-parallel ranks; default 4")
    parser.add_argument("--window", type=int, default=64, help="prompts; default 64")
    parser.add_argument("--windows", type=int, default=8, help="length of a trace; default 8")
    parser.add_argument("--layers", type=int, default=4, help="layers looked at; default 4")
    parser.add_argument("--batch", type=int, default=32, help="requests at a time; default 32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Predict, plan and replay; print."""
    names = [name.strip() for name in args.predictors.split(",") if name.strip()]
    for name in names:
        if name not in PREDICTORS:
            raise ValueError(f"unknown predictor {name!r}; choose from {', '.join(PREDICTORS)}")
    for flag, least in (("tp", 1), ("window", 8), ("windows", 4), ("layers", 1), ("batch", 1)):
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag} must be at least {least}, got {getattr(args, flag)}")
    traces = list(all_traces(args))
    for name in names:  # what is not installed is said before minutes of work
        PREDICTORS[name](np.ones((args.window * 2, 1, 1)), args.window)
    starts = range(2 * args.window, (args.windows - 1) * args.window + 1, args.window // 2)
    results: list[dict[str, Any]] = []
    with progress("predicting", len(traces) * len(starts) * len(names)) as step:
        for trace in traces:
            found = compare(trace, names, args.window, starts, args.tp, args.batch, step)
            results.append({"trace": trace.name, **found})
    if args.json:
        print_json({"tp": args.tp, "window": args.window, "results": results})
        return 0
    print(f"TP {args.tp}, windows of {args.window} prompts, {len(starts)} predictions per trace")
    print_table(
        "part of the load that is at another head in the next window, %",
        ["trace", *names],
        [[r["trace"], *(f"{100 * r['error'][n]:.2f}" for n in names)] for r in results],
    )
    columns = ["contiguous", "known", *names]
    print_table(
        "imbalance in the next window (fullest rank / mean rank)",
        ["trace", *columns],
        [[r["trace"], *(f"{r['imbalance'][n]:.3f}" for n in columns)] for r in results],
    )
    print_table(
        "seconds per prediction",
        ["", *names],
        [["mean", *(f"{np.mean([r['seconds'][n] for r in results]):.4f}" for n in names)]],
    )
    return 0


def compare(
    trace: Trace,
    names: list[str],
    window: int,
    starts: range,
    tp: int,
    batch: int,
    step: Any = None,
) -> dict[str, dict[str, float]]:
    """Means over the predictions at ``starts``, by predictor.

    ``error``: ``misplaced`` against the next window. ``imbalance``: of a plan from the prediction
    on the next window's prompts; also of ``contiguous``, and of ``known``, a plan from that window
    itself. ``seconds``: of a prediction.
    """
    error: dict[str, list[float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    imbalance: dict[str, list[float]] = {name: [] for name in ["contiguous", "known", *names]}
    traffic = Traffic(batch=batch, steps=window, shortest=16, longest=64)
    for start in starts:
        ahead = trace.kept[start : start + window]
        truth = ahead.mean(axis=0)
        expected = {"contiguous": truth, "known": truth}
        for name in names:
            began = time.perf_counter()
            expected[name] = PREDICTORS[name](trace.kept[:start], window)
            seconds[name].append(time.perf_counter() - began)
            error[name].append(misplaced(expected[name], truth))
            if step is not None:
                step()
        for name, loads in expected.items():
            policy = "contiguous" if name == "contiguous" else "fair_copying"
            plan = Planner(policy=policy, tp_size=tp).from_expectation(loads, measured=True)
            imbalance[name].append(simulate(plan, ahead, loads, traffic).imbalance)
    return {
        "error": {name: float(np.mean(values)) for name, values in error.items()},
        "imbalance": {name: float(np.mean(values)) for name, values in imbalance.items()},
        "seconds": {name: float(np.mean(values)) for name, values in seconds.items()},
    }


def all_traces(args: argparse.Namespace) -> Iterator[Trace]:
    """Two of each file of requests, steady and with a shift half-way, and three made-up ones."""
    count = args.window * args.windows
    for number, path in enumerate(args.requests):
        rng = np.random.default_rng([args.seed, number])
        kept = read_requests(path).kept
        kept = kept[:, np.unique(np.linspace(0, kept.shape[1] - 1, args.layers).astype(int))]
        name = re.sub(r"\W+", " ", Path(path).stem).strip()
        early = rng.permutation(np.arange(count) % len(kept))
        yield Trace(f"{name}, steady", lengths(kept[early], rng))
        first = tasks(path, len(kept))
        half = count // 2
        drawn = [
            rng.permutation(np.resize(part, size))
            for part, size in (
                (np.arange(first), half),
                (np.arange(first, len(kept)), count - half),
            )
        ]
        yield Trace(f"{name}, shift", lengths(kept[np.concatenate(drawn)], rng))
    for name in ("steady", "shift", "drift"):
        yield made_up(name, count, args.layers, args.window, args.seed)


def tasks(path: str | Path, count: int) -> int:
    """Requests of the first task in Tangram's ``dataset_mix`` ("name:16,name:12"), else half."""
    meta = json.loads(Path(path).read_text(encoding="utf-8")).get("meta", {})
    sizes = [int(size) for size in re.findall(r":(\d+)", str(meta.get("dataset_mix", "")))]
    return sizes[0] if len(sizes) > 1 and sum(sizes) == count else count // 2


def made_up(name: str, count: int, layers: int, window: int, seed: int) -> Trace:
    """Heads with log-normal loads that stay, change half-way, or move from one set to another."""
    rng = np.random.default_rng([seed, window])
    before, after = rng.lognormal(0.0, 0.8, (2, layers, _HEADS))
    place = np.linspace(0.0, 1.0, count)
    moved = {"steady": 0.0 * place, "shift": (place >= 0.5).astype(float), "drift": place}[name]
    base = before * (1.0 - moved)[:, None, None] + after * moved[:, None, None]
    sigma = float(np.sqrt(np.log1p(REQUEST_SPREAD**2)))
    kept = _SCALE * base * rng.lognormal(-0.5 * sigma**2, sigma, base.shape)
    return Trace(f"made up, {name}", lengths(kept, rng))


def lengths(kept: FloatArray, rng: np.random.Generator) -> FloatArray:
    """``kept [N, L, H]`` of prompts of different lengths: a log-normal factor on each."""
    sigma = float(np.sqrt(np.log1p(_LENGTHS**2)))
    return kept * rng.lognormal(-0.5 * sigma**2, sigma, len(kept))[:, None, None]

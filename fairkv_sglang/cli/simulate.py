# SPDX-License-Identifier: Apache-2.0
"""``fairkv simulate``: plan from half of the recorded prompts, replay the other half; or, with
``--adapt``, start without a profile and plan anew from what was seen, as a server does.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from fairkv_sglang.cli.output import add_fields, given, print_json, print_table, progress
from fairkv_sglang.placement import POLICIES, CostModel, Plan, Planner
from fairkv_sglang.placement.options import SPARE_LANES, FloatArray, checked
from fairkv_sglang.placement.plan_picture import draw_series
from fairkv_sglang.placement.requests import Requests, read_requests
from fairkv_sglang.placement.simulate import Replay, Traffic, simulate

ADAPTED = ("plain", "between", "after", "step")
DEFAULT_POLICIES = "contiguous,best_effort,equal_shares,fair_copying"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the sub-command."""
    parser.add_argument("requests", help="kept tokens of requests (tangram's JSON)")
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--policies", default=DEFAULT_POLICIES)
    parser.add_argument("--plan", help="replay this plan file instead of planning")
    parser.add_argument(
        "--adapt",
        type=int,
        metavar="PROMPTS",
        help="start with contiguous heads and plan anew after so many prompts, while serving",
    )
    parser.add_argument(
        "--spare-lanes", type=int, default=SPARE_LANES, help=f"default {SPARE_LANES}"
    )
    add_fields(parser, Traffic)
    parser.add_argument("--budget", type=float, default=1024.0, help="mean kept tokens per head")
    parser.add_argument("--window", type=int, default=32, help="tokens that every head keeps")
    parser.add_argument("--floor", type=float, default=0.2, help="Ada-KV floor of every head")
    parser.add_argument("--png", metavar="PATH", help="draw the balance over time")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Plan, replay both ways round, print."""
    requests = read_requests(args.requests, args.budget, args.window, args.floor)
    if args.adapt:
        vars(args).setdefault("steps", 1200)  # time for the plan and for what comes after it
        return _run_adapt(args, requests)
    names = ["plan"] if args.plan else [n.strip() for n in args.policies.split(",") if n.strip()]
    for name in names:
        if name not in POLICIES and not args.plan:
            raise ValueError(f"unknown policy {name!r}; choose from {', '.join(POLICIES)}")
    fixed = Plan.from_file(args.plan) if args.plan else None
    sizes = [fixed.tp_size] if fixed else args.tp
    traffic = _traffic(args)
    results: list[dict[str, Any]] = []
    series: dict[str, dict[str, FloatArray]] = {}
    with progress("replaying", len(sizes) * len(names) * 2 * traffic.steps) as step:
        for tp in sizes:
            for name in names:
                runs = both_ways(requests, name, tp, traffic, step, fixed)
                results.append({"tp": tp, "policy": name, **summary(runs)})
                series.setdefault(f"TP {tp}", {})[name] = runs[0][1].series
    if args.png:
        draw_series(series, args.png, f"{args.requests}, batch {traffic.batch}")
    split = "plan from half of the distinct prompts, replay the other half; then swapped"
    if args.json:
        print_json({"split": split, "traffic": traffic.model_dump(), "results": results})
        return 0
    print(f"{args.requests}: {split}")
    print(f"{traffic!r}, budget {args.budget}, window {args.window}, floor {args.floor}")
    print_table(
        "realised imbalance (fullest rank / mean rank, over layers and steps)",
        ["policy", "TP", "held out 1", "held out 2", "worst", "copies", "most"],
        [
            [r["policy"], r["tp"], *(f"{v:.3f}" for v in r["imbalance"]),
             f"{r['worst_step']:.3f}", f"{r['copies_per_layer']:.2f}", r["max_copies_in_a_layer"]]
            for r in results
        ],
        {
            "held out 1, 2": "which half of the prompts the plan had not seen",
            "worst": "the step with the highest imbalance",
            "copies, most": "copies of heads in a layer: mean, most",
        },
    )  # fmt: skip
    if args.png:
        print(f"wrote {args.png}")
    return 0


def _traffic(args: argparse.Namespace) -> Traffic:
    return checked(Traffic, **given(args, Traffic))


def _run_adapt(args: argparse.Namespace, requests: Requests) -> int:
    traffic, split = _traffic(args), "seen: half of the distinct prompts; then the other half"
    with progress("replaying", len(args.tp) * 4 * traffic.steps) as step:
        results = [
            adapt(requests, tp, traffic, args.adapt, args.spare_lanes, step) for tp in args.tp
        ]
    if args.json:
        print_json({"split": split, "traffic": traffic.model_dump(), "results": results})
        return 0
    print(f"{args.requests}: {split}")
    print(f"{traffic!r}, budget {args.budget}, window {args.window}, floor {args.floor}")
    print_table(
        f"realised imbalance, plan from the first {args.adapt} prompts; worse of both directions",
        ["TP", "spare", *ADAPTED, "copies", "s"],
        [
            [r["tp"], r["spare"], *(f"{max(r[key]):.3f}" for key in ADAPTED),
             f"{max(r['copies']):.2f}", f"{max(r['seconds']):.2f}"]
            for r in results
        ],
        {
            "spare": "lane slots of a rank in a layer beside its home heads",
            "plain": "SGLang's own split, for the same requests",
            "between, after": "while requests from before the plan are there, and then",
            "step": "modelled decode step afterwards over that of plain TP",
            "copies": "copies of heads in a layer, mean",
            "s": "seconds of planning",
        },
    )  # fmt: skip
    return 0


def adapt(
    requests: Requests,
    tp: int,
    traffic: Traffic,
    prompts: int,
    spare: int = SPARE_LANES,
    step: Any = None,
) -> dict[str, Any]:
    """Start contiguous, plan from the first ``prompts`` requests of one half, go on with the other
    half; then the other way round.

    Llama-3.1-8B's sizes on a GPU, where slots are paid for. ``after`` counts from when no request
    from before the new plan is left; ``step`` is the modelled decode step then, with the weights of
    all slots, over that of plain tensor parallelism for the same requests.
    """
    layers, heads = requests.kept.shape[1:]
    cost = CostModel.for_device("cuda", batch=traffic.batch)
    planner, home = _planner("fair_copying", tp, heads, cost, spare), -(-heads // tp)
    budget = float(requests.kept.mean())
    seconds = []

    def replan(kept: FloatArray) -> Plan:
        start = time.perf_counter()
        plan = planner.from_requests(kept)
        seconds.append(time.perf_counter() - start)
        return plan

    def step_cost(replay: Replay, slots: int) -> float:
        tokens = replay.fullest[replay.drained :].mean()
        return float(
            tokens * cost.token_bytes * cost.kv_byte_cost + layers * slots * cost.lane_cost
        )

    plain = Planner(policy="contiguous", tp_size=tp).from_expectation(np.ones((layers, heads)))
    runs = []
    for seen, later in (requests.halves(), requests.halves()[::-1]):
        kept, expected = requests.kept[seen], np.full((layers, heads), budget)
        ours, stock = (
            simulate(plain, kept, expected, traffic, step, (prompts, new, requests.kept[later]))
            for new in (replan, lambda _: plain)
        )
        if ours.drained == traffic.steps:
            raise ValueError(
                f"--steps {traffic.steps} is too few: requests from before the new plan are left"
            )
        between, after = slice(ours.replanned, ours.drained), slice(ours.drained, None)
        runs.append(
            [stock.imbalance_of(after), ours.imbalance_of(between), ours.imbalance_of(after),
             step_cost(ours, home + spare) / step_cost(stock, home), ours.plan.copy_counts().mean()]
        )  # fmt: skip
    names = (*ADAPTED, "copies")
    figures = {name: [float(run[i]) for run in runs] for i, name in enumerate(names)}
    return {"tp": tp, "spare": spare, **figures, "seconds": seconds}


def _planner(policy: str, tp: int, heads: int, cost: CostModel, spare: int) -> Planner:
    return Planner(policy=policy, tp_size=tp, cost=cost, slots=-(-heads // tp) + spare, paid=True)


def both_ways(
    requests: Requests,
    policy: str,
    tp: int,
    traffic: Traffic,
    step: Any = None,
    fixed: Plan | None = None,
) -> list[tuple[Plan, Replay]]:
    """Plan on one half and replay the other, then the other way round.

    Plans are a server's for Llama-3.1-8B on a GPU: one spare lane, slots are paid for.
    """
    halves = requests.halves()
    if min(len(half) for half in halves) == 0:
        raise ValueError("two halves need at least two distinct prompts")
    cost = CostModel.for_device("cuda", batch=traffic.batch)
    planner = _planner(policy, tp, requests.kept.shape[2], cost, SPARE_LANES)
    out = []
    for seen, held_out in (halves[::-1], halves):
        kept = requests.kept[seen]
        plan = fixed or planner.from_requests(kept)
        replay = simulate(plan, requests.kept[held_out], kept.mean(axis=0), traffic, step)
        out.append((plan, replay))
    return out


def summary(runs: list[tuple[Plan, Replay]]) -> dict[str, Any]:
    """Figures of both directions."""
    return {
        "imbalance": [replay.imbalance for _, replay in runs],
        "worst_step": max(float(replay.series.max()) for _, replay in runs),
        "copies_per_layer": float(np.mean([plan.copy_counts().mean() for plan, _ in runs])),
        "max_copies_in_a_layer": int(max(plan.copy_counts().max() for plan, _ in runs)),
        "requests": [replay.requests for _, replay in runs],
    }

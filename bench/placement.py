# SPDX-License-Identifier: Apache-2.0
"""Benchmark of the placement policies and the router on every head profile of a folder.

    python -m fairkv_sglang.bench.placement [--profiles FOLDER] [--out FOLDER] [--only PART ...]

Plans are those of a server with default settings on a GPU (lane slots, weights and activations of
copies counted); ``solver`` alone compares policies with bounds, by bytes and without slots. Writes
placement.json and placement.md to --out, prints one line per requirement (met or not), and exits
with 1 if one is not met. Without the folder it runs on synthetic profiles. --only makes anew some
parts and keeps the others of the file there is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.cli.output import progress, quiet_stdout
from fairkv_sglang.cli.simulate import ADAPTED, adapt, both_ways, summary
from fairkv_sglang.config import from_mapping
from fairkv_sglang.model import Model
from fairkv_sglang.placement import CostModel, make_plan
from fairkv_sglang.placement.make import make_problem
from fairkv_sglang.placement.requests import Requests, read_requests
from fairkv_sglang.placement.simulate import Traffic
from fairkv_sglang.placement.solver.curves import layer_curves
from fairkv_sglang.placement.solver.small_curves import MAX_HEADS
from fairkv_sglang.placement.solver.stay import SAME
from fairkv_sglang.planning import Start, make_start
from fairkv_sglang.profiles import HeadProfile, read_profile

POLICIES = ["contiguous", "best_effort", "equal_shares", "fair_copying"]
SPLITS = (2, 4, 8)
EXACT_SECONDS, EXACT_EVERY = 0.5, 4  # of a layer; one layer of so many
ROUTER_LIMIT = {2: 1.05, 4: 1.07, 8: 1.10}
PARTS = ["plans", "solver", "router", "adapt", "slots", "speed"]
ADAPT_LIMIT = {2: 1.05, 4: 1.07, 8: 1.10}
# group, head_dim, hidden_size: public model configs
SIZES = {
    "Llama-2-7B": (1, 128, 4096),
    "Qwen2.5-7B": (7, 128, 3584),
    "gemma-3-4b": (2, 256, 2560),
    "qwen3-30b": (8, 128, 2048),
}


@dataclass
class Case:
    """One profile and the sizes of its model."""

    name: str
    path: Path
    model: Model

    def start(self, policy: str, tp: int) -> Start:
        """What a server on a GPU would start with."""
        config = from_mapping({"enabled": True, "profile": str(self.path), "placement": policy})
        return make_start(config, self.model, tp, "cuda")

    def sglang_splits(self) -> list[int]:
        """The numbers of ranks over which SGLang splits the heads."""
        heads = self.model.num_kv_heads
        return [tp for tp in SPLITS if max(heads, tp) % min(heads, tp) == 0]


def find_cases(folder: Path, made: Path) -> list[Case]:
    """Every readable profile below ``folder``; if there is no such folder synthetic ones, which
    are written to ``made``.
    """
    files = [
        path
        for path in sorted([*folder.rglob("*.tsv"), *folder.rglob("*.json")])
        if path.name != "config.json"
    ]
    if not files:
        print(f"no profiles in {folder}: synthetic ones instead", file=sys.stderr)
        rng = np.random.default_rng(0)
        for heads in (4, 8, 32):
            files.append(made / f"synthetic-16x{heads}.json")
            HeadProfile(None, rng.lognormal(0.0, 1.0, (16, heads))).save(files[-1])
        folder = made
    cases = []
    for path in files:
        name = str(path.relative_to(folder).with_suffix("")).replace("/full_attention_heads", "")
        group, head_dim, hidden = next((v for k, v in SIZES.items() if k in name), (4, 128, 4096))
        layers, heads = read_profile(path).shares.shape
        model = Model(name, layers, heads * group, heads, head_dim, hidden)
        cases.append(Case(name, path, model))
    return cases


def find_requests(folder: Path) -> dict[str, Requests]:
    """The per-layer scorers of the Tangram profiles, or synthetic requests."""
    files = sorted(folder.glob("tangram/llama-3.1-8b-instruct/*_perlayer.json"))
    if files:
        return {f.stem.removesuffix("_perlayer"): read_requests(f) for f in files}
    rng = np.random.default_rng(1)
    base = rng.lognormal(0.0, 1.0, (8, 8))
    kept = base * rng.lognormal(0.0, 0.3, (16, 8, 8))
    kept = 32 + 992 * (0.2 + 0.8 * kept / kept.mean(axis=(1, 2), keepdims=True))
    return {"synthetic": Requests(kept, np.arange(16))}


def plan_rows(cases: list[Case]) -> list[dict[str, Any]]:
    """One row per profile, split that SGLang has, and policy."""
    rows = []
    splits = [(case, tp) for case in cases for tp in case.sglang_splits()]
    with progress("planning", len(splits)) as step:
        for case, tp in splits:
            plain = 0.0
            for policy in POLICIES:
                begin = time.perf_counter()
                info = case.start(policy, tp).plan.info
                seconds = time.perf_counter() - begin
                plain = plain or info["step_cost"]  # contiguous heads come first
                rows.append(
                    {
                        "profile": case.name, "heads": case.model.num_kv_heads, "tp": tp,
                        "policy": policy, "tokens": info["token_imbalance"],
                        "step": info["step_cost"] / plain, "copies": info["copies_per_layer"],
                        "most": info["max_copies_in_a_layer"],
                        "twins": info["most_twin_bytes"] / 2**20,
                        "memory": info["capacity_imbalance"], "home": info["home_rows"],
                        "seconds": seconds,
                    }
                )  # fmt: skip
            step()
    return rows


def solver_rows(cases: list[Case]) -> list[dict[str, Any]]:
    """`fair_copying` against the exact solver and bounds: bytes alone, no lane slots."""
    rows = []
    with progress("solving", len(cases) * len(SPLITS)) as step:
        for case in cases:
            model = case.model
            loads = case.start("contiguous", 1).expected
            cost = CostModel(
                group=model.group_size, head_dim=model.head_dim, hidden_size=model.hidden_size
            )
            for tp in SPLITS:
                level = {}
                for policy in ("contiguous", "best_effort", "fair_copying"):
                    plan = make_plan(policy, loads, tp, cost)
                    problem = make_problem(loads, tp, cost)
                    level[policy] = problem.rank_costs(plan.shares()).max(axis=1)
                ours = level["fair_copying"]
                row: dict[str, Any] = {
                    "profile": case.name, "tp": tp, "layers": len(ours),
                    "most": plan.info["max_copies_in_a_layer"],
                    "above": bool(
                        (ours > SAME * level["best_effort"]).any()
                        or (ours > SAME * level["contiguous"]).any()
                    ),
                }  # fmt: skip
                if model.num_kv_heads <= MAX_HEADS:
                    tree = layer_curves(problem).levels.min(axis=0)
                    row["optimal"] = int((ours <= tree * SAME).sum())
                some = loads[::EXACT_EVERY]
                with quiet_stdout():
                    best = make_plan("exact", some, tp, cost, time_limit=EXACT_SECONDS)
                proved = np.array(best.info["proved"])
                reached = make_problem(some, tp, cost).rank_costs(best.shares()).max(axis=1)
                row["tried"], row["proved"] = len(some), int(proved.sum())
                ratio = (ours[::EXACT_EVERY] / reached)[proved]
                row["worst"] = float(ratio.max()) if len(ratio) else 1.0
                rows.append(row)
                step()
    return rows


def router_rows(folder: Path, steps: int) -> list[dict[str, Any]]:
    """Replay of the half of the prompts that the plan has not seen, both ways and two seeds."""
    rows: list[dict[str, Any]] = []
    jobs = [(s, r, tp) for s, r in find_requests(folder).items() for tp in SPLITS]
    with progress("replaying", len(jobs)) as step:
        for scorer, requests, tp in jobs:
            for policy in POLICIES:
                runs = []
                for seed in (0, 1):
                    traffic = Traffic(batch=32, steps=steps, seed=seed)
                    runs += both_ways(requests, policy, tp, traffic)
                rows.append({"scorer": scorer, "tp": tp, "policy": policy} | summary(runs))
            step()
    return rows


def adapt_rows(folder: Path, steps: int) -> list[dict[str, Any]]:
    """Replays that start without a profile and plan anew after 64 prompts; two seeds each."""
    rows = []
    files = find_requests(folder)
    with progress("adapting", len(files) * 3) as step:
        for scorer, requests in files.items():
            for tp in (2, 4, 8):
                runs = [
                    adapt(requests, tp, Traffic(batch=32, steps=steps, seed=seed), 64)
                    for seed in (0, 1)
                ]
                worst = {key: max(max(run[key]) for run in runs) for key in (*ADAPTED, "copies")}
                rows.append({"scorer": scorer, "tp": tp, "spare": runs[0]["spare"], **worst})
                step()
    return rows


def slot_rows(cases: list[Case]) -> list[dict[str, Any]]:
    """Modelled step with 1, 2 and 3 spare lanes that are paid for, over contiguous heads without
    any, on splits that SGLang has.
    """
    rows = []
    splits = [(case, tp) for case in cases for tp in case.sglang_splits()]
    with progress("slots", len(splits)) as step:
        for case, tp in splits:
            base = case.start("contiguous", tp)
            row: dict[str, Any] = {"profile": case.name, "tp": tp}
            heads = case.model.num_kv_heads
            for spare in (1, 2, 3):
                slots = min(max(heads // tp, 1) + spare, heads)
                planner = case.start("fair_copying", tp).planner.model_copy(update={"slots": slots})
                plan = planner.from_expectation(base.expected)
                row[str(spare)] = plan.info["step_cost"] / base.plan.info["step_cost"]
            rows.append(row)
            step()
    return rows


def speed_rows() -> list[dict[str, Any]]:
    """CPU time of planning large models, the slower of free and costed copies; one thread."""
    rows = []
    rng = np.random.default_rng(0)
    for layers, heads, tp, limit in ((80, 8, 8, 1.0), (128, 128, 16, 10.0), (128, 32, 16, 10.0)):
        loads = rng.lognormal(0.0, 1.0, (layers, heads)) * 1024
        seconds = []
        for cost in (None, CostModel()):
            start = time.process_time()
            make_plan("fair_copying", loads, tp, cost)
            seconds.append(time.process_time() - start)
        rows.append(
            {"layers": layers, "heads": heads, "tp": tp, "limit": limit, "seconds": max(seconds)}
        )
    return rows


def check(data: dict[str, Any]) -> list[tuple[bool, str]]:
    """The requirements, with the measured figure."""
    solved, out = data["solver"], list[tuple[bool, str]]()
    over = [r for r in solved if r["most"] > r["tp"] - 1]
    out.append((not over, f"never more than TP-1 copies in a layer ({len(over)} plans above)"))
    proved, tried = (sum(r[key] for r in solved) for key in ("proved", "tried"))
    worst = max(r["worst"] for r in solved)
    text = f"step time at most {worst:.5f} of exact on the {proved} of {tried} layers proved"
    out.append((worst <= 1.01, f"{text} optimal (<= 1.01)"))
    if certified := [r for r in solved if "optimal" in r]:
        best, total = (sum(r[key] for r in certified) for key in ("optimal", "layers"))
        text = f"step time within 0.1 % of the tree bound on {best} of {total} layers of up to"
        out.append((best >= 0.99 * total, f"{text} {MAX_HEADS} heads (>= 99 %)"))
    above = sum(r["above"] for r in solved)
    out.append((above == 0, f"no layer above best_effort or contiguous ({above} plans with one)"))
    for tp, limit in ROUTER_LIMIT.items():
        routed = [r for r in data["router"] if (r["tp"], r["policy"]) == (tp, "fair_copying")]
        worst = max(max(r["imbalance"]) for r in routed)
        out.append((worst <= limit, f"router, TP {tp}: worst {worst:.3f} (<= {limit})"))
    for tp, limit in ADAPT_LIMIT.items():
        rows = [r for r in data["adapt"] if r["tp"] == tp]
        worst, plain = (max(r[key] for r in rows) for key in ("after", "plain"))
        text = f"started without a profile, TP {tp}: worst {worst:.3f} after the first new plan"
        out.append((worst <= limit, f"{text}, plain TP {plain:.3f} (<= {limit})"))
    lost = [r["1"] / min(r["1"], r["2"], r["3"]) for r in data["slots"]]
    text = (
        f"one spare lane: best of 1, 2, 3 on {lost.count(1.0)} of {len(lost)} profiles and splits"
    )
    out.append((max(lost) <= 1.01, f"{text}, else worse by at most {max(lost) - 1:.2%} (<= 1 %)"))
    for r in data["speed"]:
        text = f"{r['layers']} layers x {r['heads']} heads x TP {r['tp']}: {r['seconds']:.2f} s"
        out.append((r["seconds"] <= r["limit"], f"{text} of CPU (<= {r['limit']:.0f})"))
    return out


PLANS = {
    "profile": "profile", "TP": "tp", "policy": "policy", "tokens": "tokens:.3f",
    "step": "step:.3f", "copies/layer": "copies:.2f", "most": "most", "twins MiB": "twins:.0f",
    "memory": "memory:.3f", "rows at home": "home:.1%", "s": "seconds:.2f",
}  # fmt: skip
ROUTER = {
    "scorer": "scorer", "TP": "tp", "policy": "policy", "worst": "worst:.3f",
    "mean": "mean:.3f", "worst step": "worst_step:.3f", "copies/layer": "copies_per_layer:.2f",
    "most": "max_copies_in_a_layer",
}  # fmt: skip
ADAPT = {
    "scorer": "scorer", "TP": "tp", "spare lanes": "spare", "plain TP": "plain:.3f",
    "leaving": "between:.3f", "after": "after:.3f", "step": "step:.3f",
    "copies/layer": "copies:.2f",
}  # fmt: skip
SLOTS = {"profile": "profile", "TP": "tp", "1": "1:.3f", "2": "2:.3f", "3": "3:.3f"}
"""Columns of the tables: key of a row, and its format."""


def table(
    title: str, text: str, columns: dict[str, str], rows: Iterable[dict[str, Any]]
) -> list[str]:
    """Lines of a section with a table; what a row does not have is a dash."""
    lines = ["", f"## {title}", "", text, "", "| " + " | ".join(columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    for row in rows:
        cells = []
        for column in columns.values():
            key, _, form = column.partition(":")
            cells.append("-" if row.get(key) is None else format(row[key], form))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(data: dict[str, Any]) -> str:
    """The results as tables."""
    lines = ["# Placement benchmark", "", f"Made by `{data['command']}`.", ""]
    lines += [f"{key}: {value}  " for key, value in data["machine"].items()]
    lines += ["", "## Requirements", ""]
    lines += [f"- {'met' if ok else 'NOT MET'}: {text}" for ok, text in data["checks"]]
    lines += table(
        "Plans at start",
        "Of a server with default settings on a GPU (a quarter of 4,096 tokens, batch 32, one "
        "spare lane). tokens: sum over layers of the fullest rank over the mean rank. step: "
        "modelled attention time, weights of all lane slots counted, over contiguous heads'. "
        "twins: of the rank with most. memory: fullest rank's total over the mean. A note: "
        "qwen3-30b was averaged over two ranks upstream and says nothing about imbalance.",
        PLANS,
        data["plans"],
    )
    lines += table(
        "Router, held-out prompts",
        "Plan from half of the distinct prompts, replay of the other half, then swapped; two seeds "
        "each; batch 32, arrivals and departures. The worst of the four runs, and their mean.",
        ROUTER,
        (
            {**r, "worst": max(r["imbalance"]), "mean": np.mean(r["imbalance"])}
            for r in data["router"]
        ),
    )
    lines += table(
        "Started without a profile",
        "Contiguous heads at first; a new plan from the first 64 prompts of one half, after which "
        "the prompts are of the other half, then swapped; two seeds each; batch 32; the worst of "
        "the four runs. leaving: until the last request from before the plan has left; after: from "
        "then on; step: modelled step then, all slots' weights counted, over plain TP.",
        ADAPT,
        data["adapt"],
    )
    lines += table(
        "Spare lanes",
        "Modelled step over contiguous heads without spare lanes; all slots' weights counted.",
        SLOTS,
        data["slots"],
    )
    return "\n".join(lines) + "\n"


def compact(data: dict[str, Any]) -> str:
    """JSON with one line per row and floats cut to six digits."""

    def cut(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {k: cut(v) for k, v in value.items()}
        return [cut(v) for v in value] if isinstance(value, (list, tuple)) else value

    parts = []
    for key, value in cut(data).items():
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            parts.append(f" {json.dumps(key)}: [\n  {rows}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    """Run all and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--profiles", type=Path, default=Path("../shared/profiles"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--steps", type=int, default=400, help="of a replay; default 400")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "placement.json"
    data = json.loads(file.read_text(encoding="utf-8")) if args.only != PARTS else {}
    data |= {
        "command": "python -m fairkv_sglang.bench.placement " + " ".join(sys.argv[1:]),
        "machine": {
            "CPU": f"{platform.machine()}, {os.cpu_count()} cores, one thread used",
            "Python": platform.python_version(),
            "numpy": np.__version__,
        },
    }
    with tempfile.TemporaryDirectory() as made:
        cases = find_cases(args.profiles, Path(made))
        makers: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "plans": lambda: plan_rows(cases),
            "solver": lambda: solver_rows(cases),
            "router": lambda: router_rows(args.profiles, args.steps),
            "adapt": lambda: adapt_rows(args.profiles, 1200),
            "slots": lambda: slot_rows(cases),
            "speed": speed_rows,
        }
        for part in args.only:
            data[part] = makers[part]()
    checks = data["checks"] = check(data)
    file.write_text(compact(data), encoding="utf-8")
    (args.out / "placement.md").write_text(markdown(data), encoding="utf-8")
    for ok, text in checks:
        print(f"{'met    ' if ok else 'NOT MET'}  {text}")
    return 0 if all(ok for ok, _ in checks) else 1


if __name__ == "__main__":
    sys.exit(main())

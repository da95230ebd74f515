# SPDX-License-Identifier: Apache-2.0
"""Re-planning while serving, on real engines: docs/replanning.md has the figures.

    python -m fairkv_sglang.bench.replan shift [--profile FILE] [--out FOLDER]
    python -m fairkv_sglang.bench.replan start [--model demo|skewed] [--tp N] [--rounds N] [--pair]

`shift`: task A's prompts, then task B's; balance by prompt beside an engine that never plans anew
and one that starts with a plan made from B's counts. `start`: an engine without a profile serves 64
prompts; then rounds side by side with engines that have the plan made from the same counts, without
and with re-planning, and with plain tensor parallelism (--pair: beside the first of these alone,
where memory is short). Both write JSON to FOLDER, `shift` a picture. --profile: whose shares the
skewed model's heads keep (without: log-normal ones).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.bench import replan_model
from fairkv_sglang.bench.engine.process import Call, EngineProcess
from fairkv_sglang.bench.engine.run import ended_by_signal
from fairkv_sglang.bench.stats import ratios, rotated, spread
from fairkv_sglang.placement import CostModel, Planner

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # behind everything else; `demo` is a folder of the checkout
from demo.prompts import make_prompts  # type: ignore[import-not-found]  # noqa: E402

AT_ONCE, BATCH, NEW = 12, 16, 96
"""Requests of the stream; of a timed round, and how many tokens each gets."""
SETS = 2
"""Sets of prompts that timed rounds take in turn: they stay in the prefix cache, or a round would
be mostly prefill."""
OF_A, OF_B, AFTER = 96, 128, 64
BIN = 16  # prompts
NEAR = 0.03

Prompts = list[list[int]]


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=("shift", "start"))
    parser.add_argument("--model", choices=("demo", "skewed"), default="skewed")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--pair", action="store_true")
    parser.add_argument("--profile", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("docs/results"))
    options = parser.parse_args(arguments)
    with (
        ended_by_signal(),
        tempfile.TemporaryDirectory(prefix="fairkv-replan-") as name,
        Bench(options, name) as made,
    ):
        name, result = made.shift() if options.what == "shift" else made.start()
    file = options.out / f"replan-{name}.json"
    lines = [f'"{key}": {json.dumps(value)}' for key, value in result.items()]
    file.write_text("{" + ",\n".join(lines) + "}\n")
    if options.what == "shift":
        draw(result, file.with_suffix(".png"))
    print("\n".join(lines[:-1]))
    return 0


class Bench(contextlib.ExitStack):
    """Engines of one command."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        super().__init__()
        self.tp, self.rounds, self.folder = options.tp, options.rounds, Path(folder)
        self.pair = options.pair
        self.is_demo = options.what == "start" and options.model == "demo"
        self.ratio = 0.25 if self.is_demo else replan_model.RATIO
        self.model = ROOT / "demo" / "model"
        if not self.is_demo:
            target = replan_model.targets(options.profile)
            self.model = replan_model.build_skewed(target, self.folder / "model")

    def engine(self, name: str, **fairkv: Any) -> EngineProcess:
        """A new engine, frozen until it is called."""
        options = {
            "model_path": str(self.model),
            "tp_size": self.tp,
            "device": "cpu",
            "dtype": "float32",
            "max_total_tokens": 65536,
            "skip_tokenizer_init": True,
            "dist_timeout": 24 * 3600,  # engines are frozen between their turns
            "random_seed": 1,
            "log_level": "info",
        }
        pool = (SETS + 1) * BATCH * 1024  # all sets stay cached
        both = {"fairkv": {"ratio": self.ratio, "prefill_pool": pool, **fairkv}, "engine": options}
        made = EngineProcess(self.folder / f"{name}.log", both, measure=True)
        self.callback(made.close)
        made.freeze()
        print(f"{name} is ready", file=sys.stderr, flush=True)
        return made

    def prompts(self, count: int, seed: int, task: str = "A") -> Prompts:
        """Prompts of the model's own kind."""
        if self.is_demo:
            return [p.token_ids for p in make_prompts(seed=seed, count=count, tokens=1024, facts=8)]
        return replan_model.prompts(task, count, seed)

    def plan(self, kept: Any, state: Call) -> str:
        """File of a plan from kept tokens, with the slots of the engine whose state it is."""
        planner = Planner(
            tp_size=self.tp,
            cost=CostModel.model_validate(state["planned"]["cost_model"]),
            slots=state["ranks"][0]["lane_slots"] // len(kept),
        )
        plan = planner.from_expectation(kept)
        file = self.folder / "plan.json"
        plan.to_file(file)
        return str(file)

    def shift(self) -> tuple[str, Call]:
        """Balance by prompt over a shift of the traffic, and the answers."""
        b = self.prompts(OF_B, 2, "B")
        prompts = self.prompts(OF_A, 1) + b
        lengths = np.random.default_rng(3).integers(32, 129, len(prompts)).tolist()
        stream = {"prompts": prompts, "new_tokens": lengths, "at_once": AT_ONCE, "look": True}
        following = self.engine("following")
        runs = {"re-planning": following.call("serve", **stream)}
        following.close()
        state = runs["re-planning"]["fairkv"]
        plain = self.engine("plain", replan="off", placement="contiguous")
        short = {"new_tokens": [2] * OF_B, "at_once": AT_ONCE}
        plan = self.plan(_kept(plain.call("serve", prompts=b, **short)["fairkv"]), state)
        runs["plain TP"] = plain.call("serve", **stream)
        plain.close()
        offline = self.engine("offline", replan="off", plan=plan)
        stream |= {"prompts": b, "new_tokens": lengths[OF_A:]}
        runs["plan from B's counts"] = offline.call("serve", **stream)
        points = {name: _while_full(run["looks"]) for name, run in runs.items()}
        points["plan from B's counts"][:, 0] += OF_A
        levels = {name: by_prompt(found) for name, found in points.items()}
        ours, goal = levels["re-planning"], levels["plan from B's counts"]
        off = [i for i in range(OF_A // BIN, len(ours)) if ours[i] > goal[i] + NEAR]
        new, old, alone = (run["outputs"] for run in runs.values())
        looks = pairwise(runs["re-planning"]["looks"])
        return "shift", {
            "prompts": {"A": OF_A, "B": OF_B, "at_once": AT_ONCE, "per_bin": BIN},
            "restored_prompts_after_shift": (off[-1] + 1) * BIN - OF_A if off else 0,
            "mean_from_64_after_shift": {
                name: float(np.mean(level[(OF_A + AFTER) // BIN :]))
                for name, level in levels.items()
            },
            "max_over_mean": levels,
            "replans": state["replans"],
            "replans_at": [y["prompts"] for x, y in looks if y["replans"] > x["replans"]],
            "same_answers": sum(map(list.__eq__, new, old)),
            "same_answers_of_plan_from_B": sum(map(list.__eq__, new[OF_A:], alone)),
            "longest_ms": 1e3 * max(r["replan_longest_seconds"] for r in state["ranks"]),
            "points": {name: found.round(4).tolist() for name, found in points.items()},
        }

    def start(self) -> tuple[str, Call]:
        """An engine without a profile after 64 prompts, beside a plan from the same counts."""
        following = self.engine("following")
        stream = {"new_tokens": [NEW] * AFTER, "at_once": AT_ONCE}
        first = self.prompts(AFTER, 11)
        learned = following.call("serve", prompts=first, **stream)["fairkv"]
        following.freeze()
        plan = self.plan(_kept(learned), learned)
        engines = {
            "re-planning": following,
            "offline": self.engine("offline", replan="off", plan=plan),
        }
        if not self.pair:
            engines |= {
                "offline, re-planning on": self.engine("both", plan=plan),
                "plain TP": self.engine("plain", replan="off", placement="contiguous"),
            }
        for engine in list(engines.values())[1:]:  # pages in use become scattered in all of them
            engine.call("serve", prompts=first, **stream)
            engine.freeze()
        rounds: list[dict[str, Call]] = []
        for number in range(-SETS, self.rounds):  # the first ones fill the prefix caches
            prompts = self.prompts(BATCH, 100 + number % SETS)
            found = {}
            for name in rotated(list(engines), number):
                run = {"prompts": prompts, "new_tokens": [NEW] * BATCH, "cached": True}
                found[name] = timed(engines[name].call("serve", **run))
                engines[name].freeze()
            rounds += [found] if number >= 0 else []
            print(f"round {number + 1} of {self.rounds}", file=sys.stderr, flush=True)
        times = {n: [r[n]["step_ms"] for r in rounds] for n in engines}
        longest = 1e3 * max(r["replan_longest_seconds"] for r in learned["ranks"])
        model = "demo" if self.is_demo else "skewed"
        return f"start-{model}-tp{self.tp}", {
            "replans_in_64_prompts": learned["replans"],
            "replans": {n: rounds[-1][n]["replans"] for n in engines},
            "max_over_mean": {n: spread([r[n]["imbalance"] for r in rounds]) for n in engines},
            "step_ms": {n: spread(values) for n, values in times.items()},
            "throughput_over_offline": {n: ratios(times["offline"], times[n]) for n in engines},
            "longest_wait_ms": longest,
            "longest_wait_over_step": longest / float(np.mean(times["re-planning"])),
            "lane_weight_bytes": [r["lane_weight_bytes"] for r in learned["ranks"]],
            "rounds": rounds,
        }


def _kept(state: Call) -> Any:
    """Mean kept tokens ``[L, H]``."""
    return np.array(state["kept"]["tokens"]) / state["kept"]["prompts"]


def timed(run: Call) -> Call:
    """Figures of one round: balance is that of the last 64 decode steps."""
    names = {"steps": "steps", "batch": "batch", "step_ms": "period_ms", "cpu_ms": "cpu_slowest_ms"}
    found = {name: run["measured"][key] for name, key in names.items()}
    state = run["fairkv"]
    return {**found, "imbalance": 1 / state["balancedness"], "replans": state["replans"]}


def _while_full(looks: list[Call]) -> Any:
    """``[looks, 2]`` prompt number and max/mean while the stream is full."""
    full = [x for x in looks if x["requests"] >= AT_ONCE - 2]
    return np.array([[x["prompts"], x["imbalance"]] for x in full])


def by_prompt(points: Any) -> list[Any]:
    """Mean max/mean of each 16 prompts; None where there was no look."""
    bins = points[:, 0] // BIN
    found = [points[bins == i, 1] for i in range((OF_A + OF_B) // BIN)]
    return [round(float(x.mean()), 4) if len(x) else None for x in found]


def draw(result: Call, file: Path) -> None:
    """Balance over prompts; lines are means over 8 prompts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    colours, styles = ("tab:blue", "tab:gray", "tab:green"), ("-", "--", "--")
    for (name, found), colour, style in zip(result["points"].items(), colours, styles, strict=True):
        at, value = np.array(found).T
        if style == "-":
            axes.plot(at, value, ".", color=colour, markersize=3, alpha=0.4)
        places = np.unique(at)
        means = [value[abs(at - place) <= 4].mean() for place in places]
        axes.plot(places, means, style, color=colour, linewidth=2, label=name)
    for number, place in enumerate(result["replans_at"]):
        label = None if number else "plan adopted"
        axes.axvline(place, color="tab:orange", linewidth=1.2, label=label)
    axes.axvline(OF_A, color="black", linewidth=1.2, label="task B from here")
    axes.set_xlabel("prompts served")
    axes.set_ylabel("max / mean of the ranks' reads in a decode step")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    sys.exit(main())

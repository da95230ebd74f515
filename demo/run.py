# SPDX-License-Identifier: Apache-2.0
"""``make demo``: a real server with a quarter of the cache, and what FairKV does with it.

Starts ``launch.py`` twice, first as stock SGLang, then with FairKV, and asks both the same recall
questions over HTTP. Prints prompts, answers, how many are right, what memory the caches took, and
the load of each rank under plain tensor parallelism and under FairKV's placement.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # behind everything else: kernels/ and patches/ must not be found first

from demo.models import MODELS, Question  # noqa: E402
from fairkv_sglang.kernels.pages import PAGE_TOKENS  # noqa: E402
from fairkv_sglang.placement import Plan  # noqa: E402

START_SECONDS = 300.0
BAR_WIDTH = 36


def main() -> int:
    """Run both servers; status 0 if FairKV recalls nearly as well as the full cache."""
    args = _arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    model = MODELS[args.model]
    args.folder = model.folder()
    rounds = [
        model.questions(args.folder, seed, args.prompts, args.tokens, args.facts)
        for seed in range(args.seed, args.seed + args.rounds)
    ]
    prompts = [prompt for part in rounds for prompt in part]
    console.print(
        f"[bold]{args.rounds} rounds of {args.prompts} recall prompts of about {args.tokens} "
        f"tokens[/], model {args.model}, TP {args.tp}"
    )
    stock = _serve(console, "stock SGLang", args, rounds, [])
    flags = ["--fairkv", "--fairkv-ratio", str(args.ratio), "--fairkv-scorer", args.scorer]
    if args.scorer == "snapkv":  # both profiles are measured with it
        flags += ["--fairkv-profile", str(model.profile)]
    flags += ["--fairkv-expected-prompt", str(args.tokens)]
    flags += ["--fairkv-expected-batch", str(args.prompts)]
    fair = _serve(console, f"FairKV, {args.ratio:.0%} of the cache", args, rounds, flags)
    _print_answers(console, rounds[0], stock["answers"], fair["answers"])
    right = {name: _right(prompts, run["answers"]) for name, run in _named(stock, fair)}
    _print_summary(console, args, right, stock, fair)
    _print_loads(console, fair["state"], args.tp)
    kept_up = right["FairKV"] >= 0.9 * right["stock SGLang"] and right["stock SGLang"] > 0
    if not kept_up:
        console.print("[red]FairKV answered clearly fewer questions than the full cache.[/]")
    return 0 if kept_up else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="small", help="default: small")
    parser.add_argument("--tp", type=int, help="tensor-parallel ranks")
    parser.add_argument("--ratio", type=float, help="part of the cache that is kept")
    parser.add_argument("--scorer", help="what a token is worth")
    parser.add_argument("--prompts", type=int, help="asked at once")
    parser.add_argument("--rounds", type=int, help="each with prompts of its own")
    parser.add_argument("--tokens", type=int, default=1024, help="prompt length")
    parser.add_argument("--facts", type=int, help="facts in each prompt")
    parser.add_argument("--seed", type=int, default=7, help="seed of the prompts")
    args = parser.parse_args()
    for name in ("tp", "scorer", "ratio", "prompts", "rounds", "facts"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(MODELS[args.model], name))
    return args


def _named(stock: dict[str, Any], fair: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("stock SGLang", stock), ("FairKV", fair)]


# -- servers --------------------------------------------------------------------------------------


def _serve(
    console: Console,
    name: str,
    args: argparse.Namespace,
    rounds: list[list[Question]],
    flags: list[str],
) -> dict[str, Any]:
    """Start a server, ask the questions of each round at once, read its state, stop it."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "--model-path",
        str(args.folder),
        "--tp",
        str(args.tp),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--max-total-tokens",
        "32768",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *flags,
    ]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            with Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            ) as progress:
                progress.add_task(f"starting {name}")
                _wait_until_ready(server, url, log)
                progress.add_task(f"questions to {name}")
                answers, seconds = [], []
                for prompts in rounds:
                    started = time.monotonic()
                    with ThreadPoolExecutor(len(prompts)) as pool:
                        answers += pool.map(lambda prompt: _ask(url, prompt), prompts)
                    seconds.append(time.monotonic() - started)
            info = _get(url + "/server_info")
        finally:
            _stop(server)
    state = info["internal_states"][0]
    return {"answers": answers, "seconds": seconds, "state": state.get("fairkv"), "info": state}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            log.seek(0)
            raise SystemExit("the server did not start:\n" + "".join(log.readlines()[-30:]))
        try:
            _get(url + "/health")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"the server was not ready after {START_SECONDS:.0f} s")


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as reply:
        body = reply.read()
    return json.loads(body) if body else None


def _ask(url: str, prompt: Question) -> str:
    request = urllib.request.Request(
        url + "/generate",
        data=json.dumps(
            {
                "input_ids": prompt.input_ids,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": prompt.new_tokens,
                },
            }
        ).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        return str(json.loads(reply.read())["text"]).strip()


def _stop(server: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, sign)
        except ProcessLookupError:
            return
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            continue


# -- report ---------------------------------------------------------------------------------------


def _right(prompts: list[Question], answers: list[str]) -> int:
    return sum(p.check.passes(answer) for p, answer in zip(prompts, answers, strict=True))


def _print_answers(
    console: Console, prompts: list[Question], stock: list[str], fair: list[str]
) -> None:
    table = Table(title="end of the prompt and the answers", title_justify="left")
    for column in ("question", "expected", "stock SGLang", "FairKV"):
        table.add_column(column, no_wrap=True)
    for prompt, full, kept in zip(prompts, stock, fair, strict=False):  # of the first round
        marks = ["green" if prompt.check.passes(x) else "red" for x in (full, kept)]
        table.add_row(
            prompt.short,
            prompt.expected,
            f"[{marks[0]}]{full}[/]",
            f"[{marks[1]}]{kept}[/]",
        )
    console.print(table)


def _print_summary(
    console: Console,
    args: argparse.Namespace,
    right: dict[str, int],
    stock: dict[str, Any],
    fair: dict[str, Any],
) -> None:
    state = fair["state"]
    kept = state["kept"]
    heads = np.asarray(kept["tokens"]).size
    page = state["ranks"][0]["page_bytes"]
    token_bytes = page // PAGE_TOKENS
    full_bytes = kept["prompt_tokens"] * heads * token_bytes
    kept_bytes = int(np.sum(kept["tokens"])) * token_bytes
    table = Table(title="with and without FairKV", title_justify="left")
    for column in ("", "stock SGLang", "FairKV"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        "answers right",
        *(f"{right[n]} of {args.prompts * args.rounds}" for n in ("stock SGLang", "FairKV")),
    )
    table.add_row(
        "KV of the prompts", f"{full_bytes / 2**20:.1f} MiB", f"{kept_bytes / 2**20:.1f} MiB"
    )
    table.add_row("kept", "100 %", f"{kept_bytes / full_bytes:.1%}")
    table.add_row(
        "seconds a round, median", *(f"{median(x['seconds']):.1f}" for x in (stock, fair))
    )
    each = [" ".join(f"{second:.1f}" for second in x["seconds"]) for x in (stock, fair)]
    table.add_row("each round", *each)
    console.print(table)


def _print_loads(console: Console, state: dict[str, Any], tp: int) -> None:
    """Kept tokens of each rank, layer by layer, as bars: plain TP against the plan."""
    plan = Plan.from_json(json.dumps(state["plan"]))
    tokens = np.asarray(state["kept"]["tokens"], dtype=float) / max(state["kept"]["prompts"], 1)
    heads = plan.num_kv_heads
    plain = np.zeros((plan.num_layers, tp))
    for head in range(heads):
        plain[:, head * tp // heads] += tokens[:, head]
    fair = np.einsum("lrh,lh->lr", plan.shares(), tokens)
    top = max(plain.max(), fair.max())
    console.print(
        "[bold]kept tokens per request and rank[/] (every layer waits for its longest bar)"
    )
    for layer in range(plan.num_layers):
        for rank in range(tp):
            before = "█" * round(BAR_WIDTH * plain[layer, rank] / top)
            after = "█" * round(BAR_WIDTH * fair[layer, rank] / top)
            label = f"layer {layer} rank {rank}" if rank == 0 else f"        rank {rank}"
            console.print(
                f"{label}  [red]{before:<{BAR_WIDTH}}[/] {plain[layer, rank]:6.0f}  "
                f"[green]{after:<{BAR_WIDTH}}[/] {fair[layer, rank]:6.0f}"
            )
    ratio = [float(x.max(axis=1).sum() / x.mean(axis=1).sum()) for x in (plain, fair)]
    console.print(
        f"slowest rank over mean: plain tensor parallelism {ratio[0]:.2f}, "
        f"FairKV {ratio[1]:.2f} with {state['copies']} copied heads ({state['placement']})"
    )


if __name__ == "__main__":
    sys.exit(main())

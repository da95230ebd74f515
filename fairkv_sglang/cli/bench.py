# SPDX-License-Identifier: Apache-2.0
"""``fairkv bench``: throughput of stock SGLang and of FairKV's placements, side by side.

Every engine is a real one in processes of its own. ``--virtual`` runs no engine: it times every
rank's share of a model of real size on one device, rank after rank.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fairkv_sglang.bench import virtual_flags
from fairkv_sglang.bench.model import parse_model
from fairkv_sglang.bench.settings import Settings
from fairkv_sglang.bench.variants import DEFAULT, VARIANTS
from fairkv_sglang.bench.workload import Workload, from_flags, parse_ints, parse_names
from fairkv_sglang.cli.output import print_json, print_table, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add = parser.add_argument
    add("--variants", default=",".join(DEFAULT), help="of " + ", ".join(VARIANTS) + " (or all)")
    add("--tp", default="2", metavar="N,N", help="tensor-parallel sizes (default 2)")
    add("--budgets", metavar="N,N", help="mean kept tokens per head, e.g. 128,512 (default 256)")
    add("--ratio", type=float, help="budget as a share of the prompt, instead of --budgets")
    add("--rounds", type=int, default=3, help="measured runs of each variant (default 3)")
    add("--prompts", type=int, default=32, help="requests of a run (default 32)")
    add("--prompt-len", metavar="N,N", help="prompt tokens (default 1024; 8192 for virtual ranks)")
    add(
        "--output-len",
        type=int,
        default=64,
        dest="output_length",
        help="new tokens of a request (default 64)",
    )
    add(
        "--shared-prefix",
        type=int,
        default=0,
        help="first tokens that all prompts have in common: prefill is short, decode is not",
    )
    add("--request-rate", type=float, help="requests per second (default: all at once)")
    add("--seed", type=int, default=0, help="of the random token ids")
    add("--model-path", type=Path, help="a checkpoint of your own (default: one made here)")
    add("--model", default="", metavar="KEY=N,..", help="shape of the model made here")
    add("--profile", type=Path, help="head profile, mapped onto the model (default: synthetic)")
    add("--scope", default="head", choices=("uniform", "head", "layer"), help="budget scope")
    add("--window", type=int, default=16, help="last prompt tokens that every head keeps")
    add("--floor-alpha", type=float, default=0.2, help="part of the budget that every head keeps")
    add("--max-total-tokens", type=int, help="KV memory of a rank in tokens, same for all")
    add("--chunked-prefill-size", type=int, default=2048, help="tokens of a prefill pass")
    add("--dtype", help="default: float32 on CPU, bfloat16 on CUDA")
    add("--device", choices=("cpu", "cuda"), help="default: CUDA where there is one")
    add("--keep-alive", type=int, metavar="N", help="most engines alive (default: what fits)")
    add(
        "--measure",
        choices=("auto", "on", "off"),
        default="auto",
        help="record where a decode step's time goes (auto: on CPU; on CUDA it slows steps down)",
    )
    add("--server", default="{}", metavar="JSON", help="further server arguments for every engine")
    add("--work-dir", type=Path, help="keep model, profile and logs here")
    add("--out", type=Path, metavar="DIR", help="write bench.json and bench.png here")
    add("--name", default=None, help="name of the files in --out (default bench, or virtual)")
    add("--json", action="store_true", help="print the result as JSON")
    virtual_flags.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run, print, write."""
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.virtual:
        return virtual_flags.run(args)
    settings = settings_of(args)
    from fairkv_sglang.bench.engines import EngineFailed
    from fairkv_sglang.bench.run import run_bench

    total = len(settings.cases()) * settings.rounds * len(settings.variants)
    try:
        with progress("runs", total) as advance:

            def done(line: str) -> None:
                print(line, file=sys.stderr, flush=True)
                if "starting" not in line:
                    advance()

            result = run_bench(settings, args.work_dir, done)
    except EngineFailed as error:
        print(f"fairkv bench: {error}", file=sys.stderr)
        return 1
    if args.out is not None:
        from fairkv_sglang.bench.report import draw

        write(result, args.out, args.name or "bench")
        draw(result, args.out / f"{args.name or 'bench'}.png")
    if args.json:
        print_json(result)
    else:
        from fairkv_sglang.bench.report import tables

        for title, columns, rows in tables(result):
            print_table(title, columns, rows)
    return 0


def write(result: dict[str, Any], folder: Path, name: str) -> None:
    """``folder/name.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")


def settings_of(args: argparse.Namespace) -> Settings:
    """The run that the flags ask for.

    Raises:
        ValueError: in one line.
    """
    if args.ratio is not None and args.budgets is not None:
        raise ValueError("--budgets and --ratio exclude each other: give tokens or a share")
    try:
        server = json.loads(args.server)
    except json.JSONDecodeError as error:
        raise ValueError(f"--server is not JSON ({error})") from None
    if not isinstance(server, dict):
        raise ValueError('--server must be a JSON object, e.g. {"page_size": 1}')
    on_cpu = args.device == "cpu"
    return from_flags(
        Settings,
        args,
        model=parse_model(args.model),
        tp_sizes=parse_ints(args.tp, "--tp"),
        budgets=parse_ints(args.budgets or "256", "--budgets"),
        variants=parse_names(args.variants, tuple(VARIANTS), "--variants"),
        workload=from_flags(
            Workload, args, prompt_lengths=parse_ints(args.prompt_len or "1024", "--prompt-len")
        ),
        dtype=args.dtype or ("float32" if on_cpu else "bfloat16"),
        measure=args.measure == "on" or (args.measure == "auto" and on_cpu),
        server=server,
    )

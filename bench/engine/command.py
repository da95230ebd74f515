# SPDX-License-Identifier: Apache-2.0
"""``fairkv bench``: throughput of stock SGLang and of FairKV's placements, side by side.

Every engine is a real one in processes of its own. ``--virtual`` runs no engine: it times every
rank's share of a model of real size on one device, rank after rank.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairkv_sglang.bench.engine.settings import EngineSettings
from fairkv_sglang.bench.stats import write
from fairkv_sglang.bench.virtual.settings import VirtualSettings
from fairkv_sglang.cli.output import print_json, print_table, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add = parser.add_argument
    add("--virtual", action="store_true", help="time the ranks' shares on one device, no engine")
    add("--work-dir", type=Path, help="keep model, profile and logs here")
    add("--out", type=Path, metavar="DIR", help="write NAME.json and NAME.png here")
    add("--name", help="name of the files in --out (default bench, or virtual)")
    add("--json", action="store_true", help="print the result as JSON")
    EngineSettings.add_flags(parser)
    VirtualSettings.add_flags(parser.add_argument_group("with --virtual"))


def run(args: argparse.Namespace) -> int:
    """Run, print, write."""
    from fairkv_sglang.bench.engine.process import EngineFailed

    settings: Any
    kind: Any
    if args.virtual:
        from fairkv_sglang.bench.virtual import report as kind
        from fairkv_sglang.bench.virtual.step import run_virtual

        settings = VirtualSettings.of(args)
        name, total = "virtual", len(settings.cases()) * len(settings.placements)

        def measure(done: Callable[[str], None]) -> dict[str, Any]:
            return run_virtual(settings, done)
    else:
        from fairkv_sglang.bench.engine import report as kind
        from fairkv_sglang.bench.engine.run import run_bench

        settings = EngineSettings.of(args)
        name, total = "bench", len(settings.cases()) * settings.rounds * len(settings.variants)

        def measure(done: Callable[[str], None]) -> dict[str, Any]:
            return run_bench(settings, args.work_dir, done)

    try:
        with progress("runs", total) as advance:

            def done(line: str) -> None:
                print(line, file=sys.stderr, flush=True)
                if "starting" not in line:
                    advance()

            result = measure(done)
    except EngineFailed as error:
        print(f"fairkv bench: {error}", file=sys.stderr)
        return 1
    if args.out is not None:
        write(result, args.out, args.name or name)
        kind.draw(result, args.out / f"{args.name or name}.png")
    if args.json:
        print_json(result)
        return 0
    for title, columns, rows in kind.tables(result):
        print_table(title, columns, rows)
    print("\n".join(kind.notes(result)))
    return 0

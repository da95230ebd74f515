# SPDX-License-Identifier: Apache-2.0
"""``fairkv``: one command for all tools. Each sub-command is one module, imported when used."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# name: (module, help). A module has add_arguments(parser) and run(args) -> exit status.
COMMANDS: dict[str, tuple[str, str]] = {
    "check": ("fairkv_sglang.cli.check", "does this installation work?"),
    "profile": ("fairkv_sglang.cli.profile", "a head profile from prompts or a running server"),
    "plan": ("fairkv_sglang.cli.plan", "place heads on ranks: profile + model + TP -> plan"),
    "plot": ("fairkv_sglang.cli.plot", "draw a plan as PNG"),
    "bench": ("fairkv_sglang.cli.bench", "throughput: stock SGLang and placements side by side"),
    "simulate": ("fairkv_sglang.cli.simulate", "replay requests through the router"),
    "predict": ("fairkv_sglang.cli.predict", "compare predictions of the heads' loads on a trace"),
    "top": ("fairkv_sglang.cli.top", "a live view of a running server"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fairkv <command> ...``; returns the exit status (2: wrong usage or input)."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fairkv",
        description="Tools of FairKV for SGLang. `fairkv <command> --help` explains a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if words[:1] == [name]:
            importlib.import_module(module).add_arguments(sub)
    args = parser.parse_args(words)
    try:
        status: int = importlib.import_module(COMMANDS[args.command][0]).run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe has left (`fairkv plan ... | head`); nothing to complain about.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        # Beside an SGLang of one's own, `pip install --no-deps` brings none of the tools' packages.
        print(
            f"fairkv {args.command}: error: {error.name} is not installed: pip install it",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError) as error:
        print(f"fairkv {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""``fairkv``: one command for all tools. Each sub-command is one module, imported when used."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import Any

from fairkv_sglang.near_miss import OneLineParser, flags_of, missing_package, unknown_flags

# name: (module, help). A module has add_arguments(parser), run(args) -> exit status, and
# take_rest(args, words) if it takes words that its parser does not know.
COMMANDS: dict[str, tuple[str, str]] = {
    "check": ("fairkv_sglang.cli.check", "does this installation work?"),
    "profile": ("fairkv_sglang.cli.profile", "a head profile from prompts or a running server"),
    "plan": ("fairkv_sglang.cli.plan", "place heads on ranks: profile + model + TP -> plan"),
    "plot": ("fairkv_sglang.cli.plot", "draw a plan as PNG"),
    "bench": ("fairkv_sglang.cli.bench", "throughput: stock SGLang and placements side by side"),
    "eval": ("fairkv_sglang.cli.eval", "what compression does to answers, on any server"),
    "simulate": ("fairkv_sglang.cli.simulate", "replay requests through the router"),
    "predict": ("fairkv_sglang.cli.predict", "compare predictions of the heads' loads on a trace"),
    "top": ("fairkv_sglang.cli.top", "a live view of a running server"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fairkv <command> ...``; returns the exit status (2: wrong usage or input)."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(
        prog="fairkv",
        description="Tools of FairKV for SGLang. `fairkv <command> --help` explains a command.",
    )
    version = f"fairkv-sglang {importlib.metadata.version('fairkv-sglang')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    subs = {
        name: commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for name, (_, text) in COMMANDS.items()
    }
    name = words[0] if words and words[0] in COMMANDS else ""
    try:
        module: Any = importlib.import_module(COMMANDS[name][0]) if name else None
        if module is not None:
            module.add_arguments(subs[name])
        args, rest = parser.parse_known_args(words)
        if hasattr(module, "take_rest"):
            module.take_rest(args, rest)
        elif rest or module is None:  # what stands before the command is not its own
            raise ValueError(unknown_flags(rest or words, flags_of(subs.get(name, parser))))
        status: int = module.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe has left (`fairkv plan ... | head`); nothing to complain about.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        # Beside an SGLang of one's own, `pip install --no-deps` brings none of the tools' packages.
        return _wrong(name, missing_package(error))
    except (ValueError, OSError) as error:
        return _wrong(name, " ".join(str(error).split()))
    return status


def _wrong(name: str, text: str) -> int:
    print(f"{f'fairkv {name}'.strip()}: error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

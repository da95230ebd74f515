# SPDX-License-Identifier: Apache-2.0
"""``fairkv bench``: the benchmark of a checkout; an installation has none."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

MISSING = (
    "fairkv bench: error: benchmarks are not installed with the package: "
    "run `pip install -e .` in a checkout of the repository, then `fairkv bench` again\n"
)


def _command() -> Any:
    return importlib.import_module("fairkv_sglang.bench.engine.command")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags."""
    if importlib.util.find_spec("fairkv_sglang.bench") is None:
        parser.exit(2, MISSING)
    _command().add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """The benchmark's exit status."""
    status: int = _command().run(args)
    return status

# SPDX-License-Identifier: Apache-2.0
"""Ranks of a test engine come out of a process that has imported SGLang already.

Nearly all of an engine's start are imports, 8 s of a core in each of its processes. SGLang spawns
its ranks and the detokenizer; here the same call gets them from :mod:`multiprocessing`'s fork
server, which imports beside the engine's own process. What a rank does from its first function on
is the same. Servers (``launch.py``) spawn in the tests, too.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver, spawn
from typing import Any

PRELOAD = [
    "fairkv_tests.fork_server_side",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
]
_get_preparation_data = spawn.get_preparation_data


def _with_variables(name: str) -> dict[str, Any]:
    """A fork server's children have the variables that it started with, so today's are sent."""
    return {**_get_preparation_data(name), "variables": dict(os.environ)}


def begin() -> None:
    """From now on ``spawn`` means the fork server, whose imports begin at once."""
    # what FairKV and the CPU platform set before ranks start is read by imports
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    set_start_method = multiprocessing.set_start_method

    def set_method(method: str | None, force: bool = False) -> None:
        set_start_method("forkserver" if method == "spawn" else method, force)

    multiprocessing.set_start_method = set_method  # type: ignore[assignment]
    spawn.get_preparation_data = _with_variables
    multiprocessing.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()

# SPDX-License-Identifier: Apache-2.0
"""A test engine and its ranks share the imports of one process.

Nearly all of an engine's start are imports, 8 s of a core in each of its processes. SGLang spawns
its ranks and the detokenizer; here the same call gets them from :mod:`multiprocessing`'s fork
server, which is itself a fork of the engine's process, made when that has imported SGLang. What a
rank does from its first function on is the same. Servers (``launch.py``) spawn in the tests, too.
"""

from __future__ import annotations

import importlib
import multiprocessing.connection
import os
import signal
import socket
import threading
from multiprocessing import forkserver, spawn, util
from typing import Any

IMPORTS = (
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
)
_get_preparation_data, _prepare = spawn.get_preparation_data, spawn.prepare


def begin() -> None:
    """Import SGLang; from now on ``spawn`` means the fork server."""
    # what FairKV and the CPU platform set before ranks start is read by imports
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    for name in IMPORTS:
        importlib.import_module(name)
    if threading.active_count() > 1:
        return  # only one of them would be in a fork: spawn, as SGLang does
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(multiprocessing.connection.arbitrary_address("AF_UNIX"))
    listener.listen()
    alive_r, alive_w = os.pipe()  # when the engine ends, so does the server
    pid = os.fork()
    if pid == 0:
        os.close(alive_w)
        _serve(listener, alive_r)
    os.close(alive_r)
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address = listener.getsockname()
    server._forkserver_alive_fd, server._forkserver_pid = alive_w, pid
    listener.close()
    spawn.get_preparation_data = _with_variables
    set_start_method = multiprocessing.set_start_method

    def set_method(method: str | None, force: bool = False) -> None:
        set_start_method("forkserver" if method == "spawn" else method, force)

    multiprocessing.set_start_method = set_method  # type: ignore[assignment]


def _serve(listener: socket.socket, alive_r: int) -> None:
    """Fork whatever the engine asks for until it ends."""
    spawn.prepare = _prepare_child
    signal.signal(signal.SIGQUIT, _tell_engine)
    util._finalizer_registry.clear()  # type: ignore[attr-defined]
    try:
        forkserver.main(listener.detach(), alive_r, [])
    finally:
        os._exit(0)


def _with_variables(name: str) -> dict[str, Any]:
    """A fork server's children have the variables that it started with, so today's are sent."""
    return {**_get_preparation_data(name), "variables": dict(os.environ)}


def _prepare_child(data: dict[str, Any]) -> None:
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(data["variables"])
    _prepare(data)


def _tell_engine(*_: object) -> None:
    """A rank that fails sends SIGQUIT to its parent, and means the engine."""
    os.kill(os.getppid(), signal.SIGQUIT)

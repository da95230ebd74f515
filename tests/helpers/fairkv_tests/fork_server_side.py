# SPDX-License-Identifier: Apache-2.0
"""Imported by the fork server itself, see ``fork_server.py``."""

from __future__ import annotations

import os
import signal
from multiprocessing import spawn
from typing import Any

_prepare = spawn.prepare


def _prepare_child(data: dict[str, Any]) -> None:
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(data["variables"])
    _prepare(data)


def _tell_engine(*_: object) -> None:
    """A rank that fails sends SIGQUIT to its parent, and means the engine."""
    os.kill(os.getppid(), signal.SIGQUIT)


spawn.prepare = _prepare_child
signal.signal(signal.SIGQUIT, _tell_engine)

# SPDX-License-Identifier: Apache-2.0
"""Ports for servers of tests, of which several may start at once."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from pathlib import Path

from filelock import FileLock

FIRST, LAST = 20_000, 29_999
"""Below the ports that systems give to whoever asks for any, so nobody takes one meanwhile."""


def free_port() -> int:
    """A port of 127.0.0.1 that is free; no other test of this user gets it for a while."""
    file = Path(tempfile.gettempdir()) / f"fairkv-test-ports-{os.getuid()}"
    with FileLock(file.with_suffix(".lock")):
        port = int(file.read_text()) if file.exists() else LAST
        for _ in range(FIRST, LAST + 1):
            port = port + 1 if port < LAST else FIRST
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
                file.write_text(str(port))
                return port
    raise OSError(f"no port from {FIRST} to {LAST} is free")

# SPDX-License-Identifier: Apache-2.0
"""A command in a pseudo-terminal, and what its screen shows."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-B0-2]|\x1b[=>]")
HOME = "\x1b[H"


class Terminal:
    """``fairkv WORDS`` in a terminal of ``columns`` x ``rows``."""

    def __init__(self, words: list[str], columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self._master, slave = pty.openpty()
        self.resize(columns, rows)
        self.settings = termios.tcgetattr(slave)
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fairkv_sglang.cli.main", *words],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is the terminal's
        )  # fmt: skip
        self._slave = slave
        self.output = ""

    def resize(self, columns: int, rows: int) -> None:
        """The window's size, from now on."""
        self.columns, self.rows = columns, rows
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._master, keys.encode())

    def until(self, shown: Callable[[str], bool], seconds: float = 60.0) -> str:
        """The first screen for which ``shown`` holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._read(0.05)
            for screen in reversed(self.screens()[-3:]):
                if shown(screen):
                    return screen
        raise AssertionError(f"not shown in {seconds} s; last:\n{self.screens()[-1:]}")

    def screens(self) -> list[str]:
        """Frames drawn so far, colours and cursor moves taken out."""
        return [_CONTROL.sub("", part).replace("\r", "") for part in self.output.split(HOME)[1:]]

    def ended(self, seconds: float = 30.0) -> int:
        """Exit status, once it has ended."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self._read(0.05)
        self._read(0.0)
        return self.process.wait(1)

    def restored(self) -> bool:
        """Are echo and line mode as they were, the cursor visible, the old screen back?"""
        own = termios.tcgetattr(self._slave)
        last = max(self.output.rfind("\x1b[?25l"), self.output.rfind("\x1b[?1049h"))
        back = min(self.output.rfind("\x1b[?25h"), self.output.rfind("\x1b[?1049l"))
        return own[3] == self.settings[3] and back > last

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    def _read(self, seconds: float) -> None:
        while select.select([self._master], [], [], seconds)[0]:
            self.output += os.read(self._master, 65536).decode("utf-8", "replace")
            seconds = 0.0

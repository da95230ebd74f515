# SPDX-License-Identifier: Apache-2.0
"""The other end of a worker: engines that wait for their turn frozen, so that they take no
processor.

An idle SGLang engine polls. On a machine with few cores several idle engines would take the time of
the one that is measured, so the process group of an engine is stopped (SIGSTOP) when its turn is
over and goes on (SIGCONT) at its next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKER = "fairkv_sglang.bench.engine.calls"
START_SECONDS, RUN_SECONDS = 900, 7200
RESERVE = 0.25
"""Part of the free memory that engines leave alone."""
ENVIRONMENT = {"FAIRKV_CONFIG": "", "FAIRKV_RESOLVED": "", "HF_HUB_OFFLINE": "1"}
"""Nobody's own configuration."""

Call = dict[str, Any]


class EngineFailed(RuntimeError):
    """An engine did not start or did not answer; the message ends with its log."""


class EngineProcess:
    """One engine.

    Args:
        log: File for the engine's output; its stem is the engine's name in messages.
        options: ``{"fairkv": ..., "engine": ...}`` for the worker.
        measure: Whether the ranks record their steps.
        worker: Module that is run.
    """

    def __init__(self, log: Path, options: Call, measure: bool, worker: str = WORKER) -> None:
        self.log, self._log = log, log.open("w")
        measured = {"FAIRKV_MEASURE_WAIT": "1" if measure else "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", worker, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **ENVIRONMENT, **measured},
            cwd=log.parent,
            text=True,
            start_new_session=True,
        )
        self._read(START_SECONDS)

    def call(self, method: str, **arguments: Any) -> Any:
        """One of the worker's calls; a frozen engine goes on."""
        self.thaw()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        return self._read(RUN_SECONDS)

    def freeze(self) -> None:
        """Stop all processes of the engine where they stand."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def close(self, seconds: float = 20) -> None:
        """End the engine and everything that it has started."""
        with contextlib.suppress(ProcessLookupError):
            self.thaw()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def _read(self, seconds: float) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        message = json.loads(line) if line else {"error": "no answer"}
        if "error" not in message:
            return message["result"]
        self.close(0)
        end = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
        said = f"engine {self.log.stem}: {message['error']}; end of {self.log}:\n{end}"
        raise EngineFailed(said)


class Engines:
    """Engines by name, as many alive as fit; the one used longest ago makes room.

    Args:
        start: Starts the engine of a name.
        capacity: How many may be alive; None finds out from the memory that the first one takes.
        available: Bytes of free memory now.
    """

    def __init__(
        self,
        start: Callable[[str], EngineProcess],
        capacity: int | None,
        available: Callable[[], int],
    ) -> None:
        self._start, self._available, self.capacity = start, available, capacity
        self.alive: dict[str, EngineProcess] = {}
        self.starts = 0

    def get(self, name: str) -> EngineProcess:
        """The engine of ``name``, running; all others are frozen."""
        for other, engine in self.alive.items():
            if other != name:
                engine.freeze()
        if name not in self.alive:
            while self.capacity is not None and len(self.alive) >= self.capacity:
                self.alive.pop(next(iter(self.alive))).close()
            before = self._available()
            self.alive[name] = self._start(name)
            self.starts += 1
            if self.capacity is None:  # a quarter of what it took is added for running
                each = max(before - self._available(), 1 << 30) * 1.25
                self.capacity = max(1, int(before * (1 - RESERVE) // each))
        engine = self.alive[name] = self.alive.pop(name)  # last in the dictionary: used last
        engine.thaw()
        return engine

    def close(self) -> None:
        """End all engines."""
        while self.alive:
            self.alive.popitem()[1].close()

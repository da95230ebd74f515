# SPDX-License-Identifier: Apache-2.0
"""Engines that are kept alive between their turns, but frozen, so that they take no processor.

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fairkv_sglang.bench.workload import Workload

START_SECONDS = 900
RUN_SECONDS = 7200


class EngineFailed(RuntimeError):
    """An engine did not start or did not answer; the message ends with its log."""


class BenchEngine:
    """One engine of one variant.

    Args:
        name: The variant, for messages.
        options: ``{"fairkv": ..., "engine": ...}`` for the worker.
        environment: Variables on top of this process's own.
        log: File for the engine's output.
    """

    def __init__(
        self, name: str, options: dict[str, Any], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.log = log
        self._log = log.open("w")
        command = [sys.executable, "-m", "fairkv_sglang.bench.worker", json.dumps(options)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **environment},
            cwd=log.parent,
            text=True,
            start_new_session=True,
        )
        self.start_state: dict[str, Any] = self._read(START_SECONDS)

    def run(self, workload: Workload, vocab: int, round_index: int) -> dict[str, Any]:
        """One run; see :func:`fairkv_sglang.bench.worker.run`."""
        self.thaw()
        call = {"workload": workload.model_dump(), "vocab": vocab, "round": round_index}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(call) + "\n")
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

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        message: dict[str, Any] = json.loads(line) if line else {"error": "no answer"}
        if "error" not in message:
            result: dict[str, Any] = message["result"]
            return result
        self.close(0)
        end = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
        raise EngineFailed(f"engine {self.name}: {message['error']}; end of {self.log}:\n{end}")


class Engines:
    """Engines by name, at most ``capacity`` alive; the one used longest ago makes room.

    Args:
        start: Starts the engine of a name.
        capacity: How many may be alive; None finds out from the memory that the first one takes.
        available: Bytes of free memory now.
    """

    def __init__(
        self,
        start: Callable[[str], BenchEngine],
        capacity: int | None,
        available: Callable[[], int],
    ) -> None:
        self._start = start
        self._available = available
        self.capacity = capacity
        self.alive: dict[str, BenchEngine] = {}
        self.starts = 0

    def get(self, name: str) -> BenchEngine:
        """The engine of ``name``, running; all others are frozen."""
        for other, engine in self.alive.items():
            if other != name:
                engine.freeze()
        engine_or_none = self.alive.pop(name, None)
        if engine_or_none is None:
            while self.capacity is not None and len(self.alive) >= self.capacity:
                self.alive.pop(next(iter(self.alive))).close()
            before = self._available()
            engine_or_none = self._start(name)
            self.starts += 1
            if self.capacity is None:
                self.capacity = fitting(before, self._available())
        self.alive[name] = engine_or_none  # last in the dictionary: used last
        engine_or_none.thaw()
        return engine_or_none

    def close(self) -> None:
        """End all engines."""
        while self.alive:
            self.alive.popitem()[1].close()


def fitting(before: int, after: int, reserve: float = 0.25) -> int:
    """Engines that fit into memory, the first one included.

    Args:
        before: Bytes available before the first one started.
        after: The same when it was ready; a quarter of what an engine took is added for running.
        reserve: Part of ``before`` to leave alone.
    """
    each = max(before - after, 1 << 30) * 1.25
    return max(1, int(before * (1 - reserve) // each))

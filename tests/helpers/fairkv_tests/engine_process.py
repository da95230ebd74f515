# SPDX-License-Identifier: Apache-2.0
"""Real engines and servers for tests, each in a process of its own with its log in a file."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from fairkv_tests.ports import free_port

HELPERS = Path(__file__).resolve().parents[1]
LAUNCH = HELPERS.parents[1] / "launch.py"
START_SECONDS = 400
CALL_SECONDS = 400

ENGINE_DEFAULTS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_total_tokens": 8192,
    "log_level": "info",
    "random_seed": 1,
}
"""Arguments of every test engine; the case's own win."""


class _Process:
    """A child in a process group of its own, with a log."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.log_file = log
        self._log = log.open("w")
        variables = {**os.environ, **environment}
        paths = (environment.get("PYTHONPATH"), str(HELPERS), os.environ.get("PYTHONPATH"))
        variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._stdout(),
            stderr=self._log,
            env=variables,
            cwd=log.parent,
            text=True,
            start_new_session=True,
        )

    def _stdout(self) -> Any:
        return subprocess.PIPE

    @property
    def log(self) -> str:
        """Everything that the engine has written so far."""
        return self.log_file.read_text(errors="replace")

    def fail(self, what: str) -> AssertionError:
        """An error that carries the end of the log."""
        return AssertionError(f"{what}; end of the log:\n" + "\n".join(self.log.splitlines()[-40:]))

    def close(self, seconds: float = 20) -> int:
        """Stop the process and whatever it has started; returns its status."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self._log.close()
        return self.process.returncode


class EngineProcess(_Process):
    """An offline engine.

    Args:
        model: Checkpoint folder.
        log: File for its output.
        fairkv: FairKV's options; None for stock ``sglang.Engine``.
        environment: Variables on top of this process's own.
        **engine: SGLang's server arguments, on top of :data:`ENGINE_DEFAULTS`.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        fairkv: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        **engine: Any,
    ) -> None:
        if "dp_size" not in engine:  # whose replicas have a port each
            engine.setdefault("nccl_port", free_port())
        options = {
            "fairkv": fairkv,
            "engine": {**ENGINE_DEFAULTS, "model_path": str(model), **engine},
        }
        command = [sys.executable, "-m", "fairkv_tests.engine_worker", json.dumps(options)]
        super().__init__(command, log, environment or {})
        self.patience: float = CALL_SECONDS
        """Seconds that a call may take."""
        self._read(START_SECONDS)

    def call(self, method: str, **arguments: Any) -> Any:
        """The engine's ``method(**arguments)``, results as JSON has them."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        return self._read(self.patience)

    def generate(
        self, prompts: list[list[int]], new_tokens: int, **sampling: Any
    ) -> list[list[int]]:
        """Greedy token ids of all prompts in one batch, end of sequence ignored."""
        parameters = {
            "temperature": 0,
            "max_new_tokens": new_tokens,
            "ignore_eos": True,
            **sampling,
        }
        results = self.call("generate", input_ids=prompts, sampling_params=parameters)
        return [result["output_ids"] for result in results]

    def generate_each(self, prompts: list[list[int]], new_tokens: list[int]) -> list[list[int]]:
        """The same with a length of its own for each output."""
        parameters = [
            {"temperature": 0, "max_new_tokens": count, "ignore_eos": True} for count in new_tokens
        ]
        results = self.call("generate", input_ids=prompts, sampling_params=parameters)
        return [result["output_ids"] for result in results]

    def fairkv(self) -> dict[str, Any]:
        """FairKV's part of the first internal state; every hook is in effect on every rank."""
        state = self.internal_states()[0]["fairkv"]
        assert [rank["rank"] for rank in state["ranks"]] == list(range(len(state["ranks"])))
        assert {rank["hooks"] for rank in state["ranks"]} == {self.call("count_hooks")}
        assert state["enabled"] and state["decisions_agree"]
        return dict(state)

    def internal_states(self) -> list[dict[str, Any]]:
        """``internal_states`` of ``/server_info``."""
        states = self.call("get_server_info")["internal_states"]
        assert isinstance(states, list)
        return states

    def gloo_policies(self) -> list[int]:
        """Scheduling policies of the network threads of gloo in all ranks."""
        found = []
        for comm in Path("/proc").glob("[0-9]*/task/[0-9]*/comm"):
            with contextlib.suppress(OSError):  # it has ended
                mine = os.getpgid(int(comm.parts[2])) == self.process.pid
                if mine and comm.read_text().startswith("gloo_tcp_loop"):
                    found.append(os.sched_getscheduler(int(comm.parts[4])))
        return found

    def _read(self, seconds: float) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.close(0)
            raise self.fail("no answer from the engine" if not ready else "the engine has ended")
        message = json.loads(line)
        if "error" in message:
            raise RuntimeError(message["error"])
        return message["result"]


class ServerProcess(_Process):
    """An HTTP server started by ``launch.py``, ready for requests.

    Args:
        arguments: Command line after ``launch.py``, without host and port.
        log: File for its output.
        environment: Variables on top of this process's own.
        module: Start ``python -m module`` instead of ``launch.py``.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        module: str | None = None,
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, *(["-m", module] if module else [str(LAUNCH)]), *arguments]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        if module is None and not {"--dp-size", "--dist-init-addr"} & set(arguments):
            command += ["--nccl-port", str(free_port())]
        super().__init__(command, log, environment or {})
        deadline = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close(0)
                raise self.fail("the server has not started")
            time.sleep(0.5)

    def _stdout(self) -> Any:
        return self._log

    def _healthy(self) -> bool:
        try:
            return self.get("/health_generate") is not None
        except (OSError, urllib.error.URLError):
            return False

    def get(self, path: str) -> str:
        """Body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=CALL_SECONDS) as response:
            return str(response.read().decode())

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """JSON answer to a POST."""
        return json.loads(self.post_text(path, body))

    def post_text(self, path: str, body: dict[str, Any]) -> str:
        """Answer to a POST."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=CALL_SECONDS) as response:
            return str(response.read().decode())

    def close(self, seconds: float = 20) -> int:
        """Ask the server to stop, then make sure of it."""
        if self.process.poll() is None:
            self.process.terminate()
        return super().close(seconds)

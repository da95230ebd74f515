# SPDX-License-Identifier: Apache-2.0
"""An engine in a process of its own that serves a steady stream and is looked at meanwhile.

Run as a program it is the worker: a JSON line in, a JSON line out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 3600
LOOK = 0.2  # seconds between two looks at the engine's state

Call = dict[str, Any]


class Engine:
    """The worker's other end.

    Args:
        model: Checkpoint.
        log: File for its output.
        fairkv: FairKV's options.
        tp: Ranks.
        at_once: Requests for which there is room.
    """

    def __init__(self, model: Path, log: Path, fairkv: Call, tp: int, at_once: int) -> None:
        self.log = log
        options = {
            "model_path": str(model),
            "tp_size": tp,
            "device": "cpu",
            "dtype": "float32",
            "max_total_tokens": 32768,
            "max_running_requests": at_once,
            "skip_tokenizer_init": True,
            "dist_timeout": 24 * 3600,  # engines are frozen between their turns
            "random_seed": 1,
            "log_level": "info",
        }
        words = [sys.executable, __file__, json.dumps({"fairkv": fairkv, "engine": options})]
        environment = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"FAIRKV_CONFIG": "", "FAIRKV_RESOLVED": "", "FAIRKV_MEASURE_WAIT": "1"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **environment},
                text=True,
                start_new_session=True,
            )
        self._answer()

    def state(self) -> Call:
        """``internal_states`` of ``/server_info``, of rank 0."""
        return self._call("state")

    def serve(
        self, prompts: list[list[int]], new_tokens: list[int], at_once: int, look: bool = True
    ) -> Call:
        """See :func:`serve`."""
        return self._call(
            "serve", prompts=prompts, new_tokens=new_tokens, at_once=at_once, look=look
        )

    def freeze(self) -> None:
        """Stop all its processes where they stand: an idle engine polls."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def close(self) -> None:
        """End it and everything that it has started."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, signal.SIGCONT)
            if self.process.stdin is not None:
                self.process.stdin.close()
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _call(self, method: str, **arguments: Any) -> Call:
        os.killpg(self.process.pid, signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Call:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        line = self.process.stdout.readline() if ready else ""
        message: Call = json.loads(line) if line else {"error": "no answer"}
        if "error" in message:
            self.close()
            end = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            raise RuntimeError(f"{message['error']}; end of {self.log}:\n{end}")
        result: Call = message["result"]
        return result


# -- in the worker ------------------------------------------------------------------------------


def state(engine: Any) -> Call:
    """FairKV's state and the ranks' recorded steps, which start anew."""
    internal = engine.get_server_info()["internal_states"][0]
    return {"fairkv": internal["fairkv"], "measured": internal.get("fairkv_measure", {})}


def serve(
    engine: Any, prompts: list[list[int]], new_tokens: list[int], at_once: int, look: bool
) -> Call:
    """A closed loop: ``at_once`` requests, each that ends is followed by the next prompt.

    Returns:
        ``outputs`` of all prompts; ``looks``, one every 0.2 s if wanted: seconds since the start,
        prompts whose kept tokens are known, plans adopted, whether lanes are under way, the balance
        of what a decode step reads at that moment, and requests; ``seconds`` of the whole.
    """
    looks: list[Call] = []
    places = asyncio.Semaphore(at_once)
    started = time.perf_counter()

    async def one(number: int) -> list[int]:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens[number], "ignore_eos": True}
        async with places:
            result = await engine.async_generate(
                input_ids=prompts[number], sampling_params=sampling
            )
        return list(result["output_ids"])

    async def watch() -> None:
        while look:
            await asyncio.sleep(LOOK)
            found = (await engine.tokenizer_manager.get_internal_state())[0]["fairkv"]
            looks.append(
                {
                    "seconds": time.perf_counter() - started,
                    "prompts": found["traffic"]["count"],
                    "replans": found["replans"],
                    "pending": found["replan_pending"],
                    "balancedness": found["balancedness"],
                    "requests": found["ranks"][0]["requests"],
                }
            )

    async def run() -> list[list[int]]:
        watching = asyncio.create_task(watch())
        try:
            return await asyncio.gather(*map(one, range(len(prompts))))
        finally:
            watching.cancel()

    outputs = engine.loop.run_until_complete(run())
    return {"outputs": outputs, "looks": looks, "seconds": time.perf_counter() - started}


CALLS: dict[str, Callable[..., Call]] = {"state": state, "serve": serve}


def main() -> None:
    """Start the engine, then answer until standard input ends."""
    options = json.loads(sys.argv[1])
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever SGLang prints goes to the log

    def answer(**message: object) -> None:
        reply.write(json.dumps(message, default=str) + "\n")
        reply.flush()

    try:
        from fairkv_sglang import Engine as FairKVEngine

        engine = FairKVEngine(fairkv=options["fairkv"], **options["engine"])
    except BaseException as error:
        answer(error=f"{type(error).__name__}: {error}")
        raise
    answer(result={})
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer(result=CALLS[call["method"]](engine, **call["arguments"]))
        except Exception as error:
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}")
    engine.shutdown()


if __name__ == "__main__":
    main()

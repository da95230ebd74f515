# SPDX-License-Identifier: Apache-2.0
"""An engine in a process of its own that serves a stream and is looked at meanwhile.

Run as a program it is the worker: a JSON line in, a JSON line out.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This folder holds a kernels.py, which other packages must not find as `kernels`.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from fairkv_sglang.bench.engines import START_SECONDS, BenchEngine  # noqa: E402

LOOK = 0.2  # seconds between two looks at the engine's state

Call = dict[str, Any]


class Engine(BenchEngine):
    """The worker's other end; it can be frozen between its turns.

    Args:
        model: Checkpoint.
        log: File for its output.
        fairkv: FairKV's options.
        tp: Ranks.
    """

    def __init__(self, model: Path, log: Path, fairkv: Call, tp: int) -> None:
        self.name, self.log, self._log = log.stem, log, log.open("w")
        options = {
            "model_path": str(model),
            "tp_size": tp,
            "device": "cpu",
            "dtype": "float32",
            "max_total_tokens": 32768,
            "skip_tokenizer_init": True,
            "dist_timeout": 24 * 3600,  # engines are frozen between their turns
            "random_seed": 1,
            "log_level": "info",
        }
        environment = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"FAIRKV_CONFIG": "", "FAIRKV_RESOLVED": "", "FAIRKV_MEASURE_WAIT": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps({"fairkv": fairkv, "engine": options})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **environment},
            text=True,
            start_new_session=True,
        )
        self._read(START_SECONDS)

    def call(self, method: str, **arguments: Any) -> Call:
        """:func:`state` or :func:`serve`; then the engine is frozen, as an idle one polls."""
        self.thaw()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        answer = self._read(3600)
        self.freeze()
        return answer


# -- in the worker ------------------------------------------------------------------------------


def state(engine: Any) -> Call:
    """FairKV's state, and what the ranks recorded of decode steps, which starts anew."""
    internal = engine.get_server_info()["internal_states"][0]
    return {**internal["fairkv"], "measured": internal["fairkv_measure"]}


def serve(
    engine: Any, prompts: list[list[int]], new_tokens: list[int], at_once: int, look: bool = False
) -> Call:
    """A closed loop: ``at_once`` requests, each that ends is followed by the next prompt. The
    prefix cache is empty at the start.

    Returns:
        ``outputs`` of all prompts; ``looks``, one every 0.2 s if wanted: prompts whose kept tokens
        are known, plans adopted, whether lanes are under way, requests, and the max/mean of what a
        decode step reads at that moment; ``state`` at the end.
    """
    looks: list[Call] = []
    places = asyncio.Semaphore(at_once)
    engine.flush_cache()
    first = state(engine)["traffic"]["count"]

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
                    "prompts": found["traffic"]["count"] - first,
                    "replans": found["replans"],
                    "pending": found["replan_pending"],
                    "requests": found["ranks"][0]["requests"],
                    "imbalance": 1 / found["balancedness"],
                }
            )

    async def run() -> list[list[int]]:
        watching = asyncio.create_task(watch())
        try:
            return await asyncio.gather(*map(one, range(len(prompts))))
        finally:
            watching.cancel()

    outputs = engine.loop.run_until_complete(run())
    return {"outputs": outputs, "looks": looks, "state": state(engine)}


def main() -> None:
    """Start the engine, then answer until standard input ends."""
    options = json.loads(sys.argv[1])
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever SGLang prints goes to the log

    def answer(**message: object) -> None:
        reply.write(json.dumps(message, default=str) + "\n")
        reply.flush()

    from fairkv_sglang import Engine as FairKVEngine

    engine = FairKVEngine(fairkv=options["fairkv"], **options["engine"])
    answer(result={})
    for line in sys.stdin:
        call = json.loads(line)
        try:
            calls: dict[str, Callable[..., Call]] = {"state": state, "serve": serve}
            answer(result=calls[call["method"]](engine, **call["arguments"]))
        except Exception as error:
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}")
    engine.shutdown()


if __name__ == "__main__":
    main()

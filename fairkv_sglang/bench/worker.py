# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own: a JSON line in, a JSON line out.

SGLang kills the process that holds an engine when a rank dies, and ranks take settings from the
environment, so engines of different variants cannot share a process.

    python -m fairkv_sglang.bench.worker '{"fairkv": {...} or null, "engine": {...}}'
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import traceback
from typing import Any

from fairkv_sglang.bench.workload import Workload


def main() -> None:
    """Start the engine, answer until standard input ends."""
    options = json.loads(sys.argv[1])
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever SGLang prints goes to the log

    def answer(**message: object) -> None:
        reply.write(json.dumps(message, default=str) + "\n")
        reply.flush()

    try:
        engine = _start(options)
    except BaseException as error:
        answer(error=f"{type(error).__name__}: {error}")
        raise
    answer(result=_state(engine))
    for line in sys.stdin:
        try:
            call = json.loads(line)
            answer(result=run(engine, Workload(**call["workload"]), call["vocab"], call["round"]))
        except Exception as error:
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}")
    engine.shutdown()


def _start(options: dict[str, Any]) -> Any:
    if options["fairkv"] is None:
        from fairkv_sglang.plugin import check_visible

        check_visible()
        from sglang import Engine

        return Engine(**options["engine"])
    from fairkv_sglang import Engine as FairKVEngine

    return FairKVEngine(fairkv=options["fairkv"], **options["engine"])


def _state(engine: Any) -> dict[str, Any]:
    state: dict[str, Any] = engine.get_server_info()["internal_states"][0]
    return {
        "measured": state.get("fairkv_measure", {}),
        "fairkv": state.get("fairkv"),
        "max_total_tokens": state.get("memory_usage", {}).get("token_capacity"),
    }


def run(engine: Any, workload: Workload, vocab: int, round_index: int) -> dict[str, Any]:
    """All requests once, at once or as they arrive.

    Returns:
        ``seconds`` of wall-clock time; ``ttft`` and ``itl`` of each request in seconds, where the
        engine reports them; ``retractions``; the ranks' measurements and FairKV's state after.
    """
    prompts = workload.make(vocab, round_index)
    sampling = {"temperature": 0, "max_new_tokens": workload.output_length, "ignore_eos": True}
    engine.flush_cache()
    before = _state(engine)  # the recording starts anew
    started = time.perf_counter()
    clock = time.time()
    if workload.request_rate is None:
        results = engine.generate(input_ids=prompts, sampling_params=sampling)
        sent = [clock] * len(prompts)
    else:
        arrivals = workload.arrivals(round_index)
        serving = _serve(engine, prompts, sampling, arrivals)
        pairs = engine.loop.run_until_complete(serving)
        sent, results = [at for at, _ in pairs], [result for _, result in pairs]
    seconds = time.perf_counter() - started
    infos = [result["meta_info"] for result in results]
    tokens = sum(info["completion_tokens"] for info in infos)
    if tokens != workload.prompts * workload.output_length:
        raise RuntimeError(f"{tokens} tokens came back, not {workload.output_length} per prompt")
    return {
        "seconds": seconds,
        "requests": len(prompts),
        "output_tokens": tokens,
        "prompt_tokens": sum(map(len, prompts)),
        **_latencies(infos, sent),
        "retractions": sum(info.get("num_retractions") or 0 for info in infos),
        **(after := _state(engine)),
        "prefill": _prefill(before["fairkv"], after["fairkv"]),
    }


def _prefill(
    before: dict[str, Any] | None, after: dict[str, Any] | None
) -> dict[str, list[float]] | None:
    """What FairKV did in prefill between two states, by rank: seconds of scoring, selection and
    copying (``compress``), of them those of the hand-over, and bytes handed over; None without
    FairKV.
    """
    if not before or not after:
        return None
    keys = ("prefill_seconds", "compress_seconds", "hand_over_seconds", "hand_over_bytes")
    pairs = list(zip(before["ranks"], after["ranks"], strict=True))
    return {key: [new[key] - old[key] for old, new in pairs] for key in keys}


async def _serve(
    engine: Any, prompts: list[list[int]], sampling: dict[str, Any], arrivals: list[float]
) -> list[tuple[float, dict[str, Any]]]:
    """Each request at its time: when it was sent, and its result."""

    async def one(prompt: list[int], delay: float) -> tuple[float, dict[str, Any]]:
        await asyncio.sleep(delay)
        sent = time.time()
        return sent, await engine.async_generate(input_ids=prompt, sampling_params=sampling)

    return await asyncio.gather(*map(one, prompts, arrivals))


def _latencies(infos: list[dict[str, Any]], sent: list[float]) -> dict[str, list[float]]:
    """Time to first token and mean time between tokens of each request, from the scheduler's own
    time stamps (``enable_metrics``); streaming would cost processor time that the ranks need.
    """
    ttft, itl = [], []
    for info, start in zip(infos, sent, strict=True):
        first = info.get("prefill_finished_time")
        if first is None:
            continue
        ttft.append(first - start)
        if info["completion_tokens"] > 1 and "e2e_latency" in info:
            rest = info["e2e_latency"] - (first - start)
            itl.append(rest / (info["completion_tokens"] - 1))
    return {"ttft": ttft, "itl": itl}


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What benchmarks ask of an engine; run as a program it is their worker."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fairkv_sglang.bench.engine.trace import summarise
from fairkv_sglang.bench.engine.worker import work

LOOK = 0.2  # seconds between two looks at the engine's state

Call = dict[str, Any]


def state(engine: Any) -> Call:
    """FairKV's state, and what the ranks recorded, which starts anew."""
    found = engine.get_server_info()["internal_states"][0]
    recorded = found.get("fairkv_measure")
    return {
        "measured": summarise(recorded) if recorded else {},
        "fairkv": found.get("fairkv"),
        "max_total_tokens": found.get("memory_usage", {}).get("token_capacity"),
    }


def serve(
    engine: Any,
    prompts: list[list[int]],
    new_tokens: list[int],
    at_once: int | None = None,
    look: bool = False,
    cached: bool = False,
) -> Call:
    """All requests once, ends of sequences ignored.

    Args:
        engine: The engine.
        prompts: Token ids.
        new_tokens: Of each request.
        at_once: A closed loop: each request that ends is followed by the next; None: all at once.
        look: Look at FairKV's state every 0.2 s.
        cached: What earlier calls left in the prefix cache stays; else it is empty at the start.

    Returns:
        ``seconds`` of wall-clock time from the first request to the last token; ``ttft`` and
        ``itl`` of each request in seconds, where the engine reports them; ``retractions``;
        ``outputs``; ``looks``: prompts whose kept tokens are known, plans adopted, requests, and
        the max/mean of what a decode step reads at that moment; the state after (:func:`state`)
        and what FairKV did in prefill.
    """
    looks: list[Call] = []
    places = asyncio.Semaphore(at_once or len(prompts))
    if not cached:
        engine.flush_cache()
    before = state(engine)["fairkv"]

    async def one(number: int) -> tuple[float, Call]:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens[number], "ignore_eos": True}
        async with places:
            sent = time.time()
            return sent, await engine.async_generate(
                input_ids=prompts[number], sampling_params=sampling
            )

    async def watch() -> None:
        while look:
            await asyncio.sleep(LOOK)
            found = (await engine.tokenizer_manager.get_internal_state())[0]["fairkv"]
            looks.append(
                {
                    "prompts": found["traffic"]["count"] - before["traffic"]["count"],
                    "replans": found["replans"],
                    "requests": found["ranks"][0]["requests"],
                    "imbalance": 1 / found["balancedness"],
                }
            )

    async def run() -> list[tuple[float, Call]]:
        watching = asyncio.create_task(watch())
        try:
            return await asyncio.gather(*map(one, range(len(prompts))))
        finally:
            watching.cancel()

    started = time.perf_counter()
    results = engine.loop.run_until_complete(run())
    seconds = time.perf_counter() - started
    infos = [result["meta_info"] for _, result in results]
    tokens = sum(info["completion_tokens"] for info in infos)
    if tokens != sum(new_tokens):
        raise RuntimeError(f"{tokens} tokens came back, not {sum(new_tokens)}")
    after = state(engine)
    return {
        "seconds": seconds,
        "requests": len(prompts),
        "output_tokens": tokens,
        "prompt_tokens": sum(map(len, prompts)),
        **_latencies(infos, [sent for sent, _ in results]),
        "retractions": sum(info.get("num_retractions") or 0 for info in infos),
        "outputs": [result["output_ids"] for _, result in results],
        "looks": looks,
        **after,
        "prefill": _prefill(before, after["fairkv"]),
    }


def _prefill(before: Call | None, after: Call | None) -> dict[str, list[float]] | None:
    """What FairKV did in prefill between two states, by rank: seconds of scoring, selection and
    copying (``compress``), of them those of the hand-over, and bytes handed over; None without
    FairKV, or where nothing is measured.
    """
    if not before or not after or "prefill_seconds" not in after["ranks"][0]:
        return None
    keys = ("prefill_seconds", "compress_seconds", "hand_over_seconds", "hand_over_bytes")
    pairs = list(zip(before["ranks"], after["ranks"], strict=True))
    return {key: [new[key] - old[key] for old, new in pairs] for key in keys}


def _latencies(infos: list[Call], sent: list[float]) -> dict[str, list[float]]:
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
    work({"state": state, "serve": serve})

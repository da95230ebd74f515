# SPDX-License-Identifier: Apache-2.0
"""What tests do to an engine beyond calling its methods: runs inside the worker's process.

Arguments and results are JSON. The worker offers every function of :data:`CALLS` like a method.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEP = 0.005  # seconds between two looks at something that another process does


async def _stream(engine: Any, prompt: list[int], parameters: dict[str, Any], seen: Any) -> Any:
    """Final output of one request; ``seen(tokens)`` after each of its outputs."""
    name = uuid.uuid4().hex
    stream = await engine.async_generate(
        input_ids=prompt, sampling_params={"temperature": 0, **parameters}, stream=True, rid=name
    )
    last = None
    async for last in stream:
        seen(name, last["meta_info"]["completion_tokens"])
    return last


def states_while_running(
    engine: Any, prompts: list[list[int]], new_tokens: int, after: int
) -> dict[str, Any]:
    """Internal states when every prompt has ``after`` new tokens and none has ended.

    Returns:
        ``states`` at that moment and the ``outputs`` of all prompts.
    """

    async def run() -> dict[str, Any]:
        progress: dict[str, int] = {}
        tasks = [
            asyncio.create_task(
                _stream(
                    engine,
                    prompt,
                    {"max_new_tokens": new_tokens, "ignore_eos": True},
                    progress.__setitem__,
                )
            )
            for prompt in prompts
        ]
        while len(progress) < len(prompts) or min(progress.values()) < after:
            if any(task.done() for task in tasks):
                raise RuntimeError(f"a request ended early, progress {sorted(progress.values())}")
            await asyncio.sleep(STEP)
        states = await engine.tokenizer_manager.get_internal_state()
        outputs = [result["output_ids"] for result in await asyncio.gather(*tasks)]
        return {"states": states, "outputs": outputs}

    return dict(engine.loop.run_until_complete(run()))


def generate_and_abort(
    engine: Any, prompts: list[list[int]], new_tokens: int, abort_after: list[int | None]
) -> list[str]:
    """Send all prompts at once and abort some.

    Args:
        engine: The engine.
        prompts: Token ids.
        new_tokens: Length of the outputs.
        abort_after: Per prompt, abort it when it has that many new tokens (0: as soon as the
            engine has it), or None.

    Returns:
        Per prompt how it ended: the type of its finish reason.
    """

    async def one(prompt: list[int], limit: int | None) -> str:
        def seen(name: str, tokens: int) -> None:
            if limit and tokens >= limit:
                engine.tokenizer_manager.abort_request(name)

        name = uuid.uuid4().hex if limit is None else f"linger-0.01-{uuid.uuid4().hex}"
        stream = await engine.async_generate(
            input_ids=prompt,
            sampling_params={"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
            stream=True,
            rid=name,
        )

        async def drain() -> str:
            reason = ""
            async for output in stream:
                seen(name, output["meta_info"]["completion_tokens"])
                reason = (output["meta_info"]["finish_reason"] or {}).get("type", "")
            return reason

        task = asyncio.create_task(drain())
        if limit == 0:
            states = engine.tokenizer_manager.rid_to_state
            while not (name in states and states[name].dispatched):  # an abort before is lost
                await asyncio.sleep(STEP)
            engine.tokenizer_manager.abort_request(name)
        try:
            return await task
        except ValueError:  # SGLang raises for requests that were aborted before their first token
            return "abort"

    async def run() -> list[str]:
        return await asyncio.gather(*map(one, prompts, abort_after))

    return list(engine.loop.run_until_complete(run()))


def adopt_plan(engine: Any, digest: str) -> None:
    """Ask for the plan of this digest until it is adopted, then wait for all of its lanes."""
    from sglang.srt.managers.io_struct import SetInternalStateReq

    from fairkv_sglang.memory.admission import LEAST_RECORDED  # stock engines do without it

    manager = engine.tokenizer_manager

    def state() -> dict[str, Any]:
        states = engine.loop.run_until_complete(manager.get_internal_state())
        return dict(states[0]["fairkv"])

    # Without traffic nothing is planned.
    sampling = {"max_new_tokens": 2, "ignore_eos": True}
    engine.generate(input_ids=[list(range(5, 70))] * LEAST_RECORDED, sampling_params=sampling)
    while (now := state())["plan_digest"] != digest:
        request = SetInternalStateReq(server_args={"fairkv_replan": 1})
        engine.loop.run_until_complete(manager.set_internal_state(request))
        for _ in range(100):
            if state()["plan_digest"] == digest:
                break
            time.sleep(STEP)
    while now["replan_pending"]:  # lanes come before forward passes
        engine.generate(input_ids=[[5, 6, 7]], sampling_params={"max_new_tokens": 16})
        now = state()


def serve_while_replanning(
    engine: Any,
    prompts: list[list[int]],
    new_tokens: list[int],
    abort_after: list[int | None],
    replans: int,
) -> dict[str, Any]:
    """All prompts at once, again and again, while one new plan after the other is asked for.

    After each round the prefix cache is flushed.

    Args:
        engine: The engine.
        prompts: Token ids.
        new_tokens: Length of each output.
        abort_after: Per prompt, abort it when it has that many new tokens, or None.
        replans: Plans that have to be adopted before the last round ends.

    Returns:
        ``rounds``: of each the outputs, None for a request that was aborted; ``replans`` adopted.
    """
    from sglang.srt.managers.io_struct import SetInternalStateReq

    manager = engine.tokenizer_manager

    async def one(number: int) -> list[int] | None:
        def seen(name: str, tokens: int) -> None:
            limit = abort_after[number]
            if limit is not None and tokens >= limit:
                manager.abort_request(name)

        sampling = {"max_new_tokens": new_tokens[number], "ignore_eos": True}
        try:
            last = await _stream(engine, prompts[number], sampling, seen)
        except ValueError:  # aborted before its first token
            return None
        ended = last["meta_info"]["finish_reason"]["type"]
        return None if ended == "abort" else list(last["output_ids"])

    async def adopted() -> int:
        return int((await manager.get_internal_state())[0]["fairkv"]["replans"])

    async def ask(done: asyncio.Event) -> None:
        while not done.is_set():
            before = await adopted()
            updated = await manager.set_internal_state(
                SetInternalStateReq(server_args={"fairkv_replan": 1})
            )
            if updated != [True]:
                raise RuntimeError("the server does not plan anew")
            while not done.is_set() and await adopted() == before:
                await asyncio.sleep(STEP)

    async def round_of_requests() -> list[list[int] | None]:
        done = asyncio.Event()
        asking = asyncio.create_task(ask(done))
        try:
            return list(await asyncio.gather(*map(one, range(len(prompts)))))
        finally:
            done.set()
            await asking

    rounds = []
    while not rounds or engine.loop.run_until_complete(adopted()) < replans:
        rounds.append(engine.loop.run_until_complete(round_of_requests()))
        empty_cache(engine)
    return {"rounds": rounds, "replans": engine.loop.run_until_complete(adopted())}


def abort_in_prefill(engine: Any, prompt: list[int], log: str, sign: str = "") -> str:
    """Send one prompt and abort it after its first pass, or after the first that says ``sign``.

    An abort that comes before its request is lost, and the log has more than this request's lines
    (a rank may be late with those of the one before), so it is the request's own line that counts.

    Args:
        engine: One with ``LINGER_PROBE``.
        prompt: Token ids.
        log: File to which the ranks write.
        sign: What has to turn up there once more, besides.

    Returns:
        The type of its finish reason.
    """

    name = f"linger-0.2-{uuid.uuid4().hex}"

    def counts() -> tuple[int, int]:
        text = Path(log).read_text(errors="replace")
        return text.count(sign), text.count(f"PROBE lingers {name}")

    async def run() -> str:
        before, _ = counts()

        async def drain() -> str:
            stream = await engine.async_generate(
                input_ids=prompt,
                sampling_params={"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
                stream=True,
                rid=name,
            )
            reason = ""
            async for output in stream:
                reason = (output["meta_info"]["finish_reason"] or {}).get("type", "")
            return reason

        task = asyncio.create_task(drain())
        while not task.done():
            signs, passes = counts()
            if passes and (not sign or signs > before):
                break
            await asyncio.sleep(STEP)
        engine.tokenizer_manager.abort_request(name)
        try:
            return await task
        except ValueError:
            return "abort"

    return str(engine.loop.run_until_complete(run()))


def update_from_tensors(engine: Any, folder: str, parts: int) -> str:
    """Update the engine's weights from the tensors of a checkpoint, sent in so many parts.

    Returns:
        What SGLang says in the end, or to what has failed.
    """
    from safetensors.torch import load_file

    tensors = sorted(load_file(f"{folder}/model.safetensors").items())
    done, message = engine.begin_weight_update()
    for part in range(parts):
        if done:
            done, message = engine.update_weights_from_tensor(tensors[part::parts])
    return str(engine.end_weight_update()[1] if done else message)


def empty_cache(engine: Any, attempts: int = 100) -> None:
    """Flush the prefix cache, which SGLang refuses while a request still has to be cleaned up."""
    for _ in range(attempts):
        if engine.flush_cache().success:
            return
        time.sleep(0.1)
    raise RuntimeError("SGLang does not flush its cache")


def count_hooks(engine: Any) -> int:
    """Rows of the ledger."""
    from fairkv_sglang.patches import all_hooks, all_overrides, cpu, cpu_overrides
    from fairkv_sglang.patches.server_args import flag_hooks

    hooks = (flag_hooks(), cpu.HOOKS, cpu.RANK_HOOKS, all_hooks())
    return sum(map(len, (*hooks, all_overrides(), cpu_overrides())))


CALLS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        states_while_running,
        generate_and_abort,
        adopt_plan,
        serve_while_replanning,
        abort_in_prefill,
        update_from_tensors,
        empty_cache,
        count_hooks,
    )
}

# SPDX-License-Identifier: Apache-2.0
"""Chaos: a real server under everything that clients do to it, and its books afterwards.

    make chaos                      2,000 requests, half of them without overlap scheduling
    python -m fairkv_tests.chaos --requests 200 --overlap on

Requests of random lengths and options come and go: streams that are cut, aborts, pauses, flushes,
bodies that are wrong, shared prefixes, memory so small that requests are retracted, plans that
change. Among them are *witnesses*, greedy requests that nobody touches: each must give the tokens
that it gave on the calm server. (One that was retracted is compressed anew, with what it had
written, and may differ; those are counted, not compared.)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

from fairkv_tests.engine_process import ServerProcess
from fairkv_tests.tiny_models import TinyModel, build, random_prompts
from fairkv_tests.workloads import CHECKS, MODEL, write_plan

VOCABULARY = 500
LONGEST_PROMPT, LONGEST_OUTPUT = 1200, 200
WITNESSES = 24
CLIENTS = 24
DRAIN_SECONDS = 60.0
ANSWER_SECONDS = 240.0

TIGHT = (
    "--max-total-tokens 9000 --fairkv-prefill-pool 2600 --max-running-requests 14 "
    "--schedule-conservativeness 0.05 --chunked-prefill-size 64 --enable-mixed-chunk"
)
"""Memory for a few requests at a time and optimistic admission: requests are retracted."""


def options_of(**fairkv: Any) -> dict[str, Any]:
    """Options of a request of its own."""
    return {"sampling_params": {"custom_params": {"fairkv": fairkv}}}


SMALL: tuple[dict[str, Any] | None, ...] = (
    None,
    None,
    {"budget": 300},
    {"ratio": 0.3, "protect": [[0, 1]]},
)
LARGE: tuple[dict[str, Any] | None, ...] = ({"ratio": 0.6}, {"compress": False})
"""What requests want kept of their prompts; long ones would not fit with the larger ones."""
LONG_PROMPT = 400

MALFORMED: tuple[tuple[str, bytes], ...] = tuple(
    (path, body if isinstance(body, bytes) else json.dumps(body).encode())
    for path, body in (
        ("/generate", b"{"),
        ("/generate", b"[1, 2"),
        ("/generate", {}),
        ("/generate", {"text": 5}),
        ("/generate", {"input_ids": "abc"}),
        ("/generate", {"input_ids": [[]]}),
        ("/generate", {"input_ids": [1] * 50_000}),
        ("/generate", {"input_ids": [1, 2], "sampling_params": {"temperature": -1}}),
        ("/generate", {"input_ids": [1, 2], "sampling_params": {"top_p": 5}}),
        ("/generate", {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": -4}}),
        ("/generate", {"input_ids": [1, 2], "sampling_params": {"logit_bias": {"7": 3e38}}}),
        ("/generate", {"input_ids": [1, 2], **options_of(budget=5)}),
        ("/generate", {"input_ids": [1, 2], **options_of(protect=[[0, 3]])}),
        ("/v1/chat/completions", {"model": "tiny", "messages": "hello"}),
        ("/v1/completions", {"model": "tiny"}),
        ("/v1/completions", b"not json"),
    )
)
"""Bodies that must be answered by a 4xx status, and by nothing else.

(SGLang answers 500 to a sampling parameter that it does not know or that has another type, FairKV
on or off, and goes on.)
"""

Body = dict[str, Any]


class ChaosFailed(AssertionError):
    """Something that must hold did not; the message says what."""


class Chaos:
    """One run against one server.

    Args:
        url: Of the server.
        requests: How many, witnesses and wrong ones included.
        seed: Of everything that is drawn.
    """

    def __init__(self, url: str, requests: int, seed: int) -> None:
        self.url, self.requests = url, requests
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        lengths = [self._length(LONGEST_PROMPT) for _ in range(WITNESSES)]
        self.prefixes = random_prompts([90, 200, 640], VOCABULARY, seed)
        prompts = map(self._prefixed, random_prompts(lengths, VOCABULARY, seed + 1))
        self.witnesses = [
            (prompt, self.rng.choice([2, 8, 24, 60]), self._wanted(prompt)) for prompt in prompts
        ]
        self.calm: list[list[int]] = []
        self._number = 0

    # -- the run ------------------------------------------------------------------------------

    async def run(self) -> Body:
        """Calm, storm, drain, calm again. Raises ChaosFailed."""
        started = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as self.http:
            self.calm = await self._all_witnesses()
            await self._storm()
            state = await self._drained()
            again = await self._all_witnesses()
            if again != self.calm:
                self.wrong.append("witnesses differ on the server that is calm again")
            state = await self._drained()
        if self.wrong:
            raise ChaosFailed("; ".join(self.wrong[:5]))
        return {
            "seconds": round(time.monotonic() - started, 1),
            **dict(sorted(self.counts.items())),
            "replans": state["replans"],
            "spills": state["spills"],
            "decisions": [rank["decisions"]["count"] for rank in state["ranks"]],
        }

    async def _all_witnesses(self) -> list[list[int]]:
        outputs = []
        for witness in self.witnesses:
            status, answer = await self._post("/generate", self._greedy(*witness))
            if status != 200:
                raise ChaosFailed(f"a calm request was answered {status}: {answer}")
            outputs.append(answer["output_ids"])
        return outputs

    async def _storm(self) -> None:
        kinds: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (0.28, self._witness),
            (0.22, self._sampled),
            (0.16, self._disconnect),
            (0.10, self._abort),
            (0.10, self._malformed),
            (0.05, self._chat),
            (0.03, self._parallel),
            (0.02, self._flush),
            (0.02, self._replan),
            (0.01, self._pause),
            (0.01, self._info),
        ]
        weights = [weight for weight, _ in kinds]
        left = self.requests

        async def client() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                _, kind = self.rng.choices(kinds, weights)[0]
                try:
                    await kind()
                except TimeoutError:
                    self.wrong.append(f"no answer to {kind.__name__} in {ANSWER_SECONDS:.0f} s")
                except aiohttp.ClientError as error:
                    self.wrong.append(f"{kind.__name__}: {error!r}")
                if self.wrong:
                    left = 0
                await asyncio.sleep(self.rng.random() * 0.05)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def _drained(self) -> Body:
        """Nothing runs any more; then nothing may be held, on any rank."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while True:
            state = await self._state()
            busy = [rank["requests"] for rank in state["ranks"]]
            if not any(busy):
                break
            if time.monotonic() > deadline:
                raise ChaosFailed(f"requests {busy} are left {DRAIN_SECONDS:.0f} s after the last")
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.0)  # SGLang's idle checks, which end a rank that leaks
        state = await self._state()
        for rank in state["ranks"]:
            for name in ("pages_used", "pages_charged", "pool_tokens_held", "tokens_stored"):
                if rank[name]:
                    self.wrong.append(f"rank {rank['rank']} holds {name} {rank[name]} at idle")
        if not state["decisions_agree"]:
            self.wrong.append("the ranks took different decisions")
        return state

    # -- what clients do ----------------------------------------------------------------------

    async def _witness(self) -> None:
        number = self.rng.randrange(len(self.witnesses))
        status, answer = await self._post("/generate", self._greedy(*self.witnesses[number]))
        if status != 200:
            self.wrong.append(f"witness {number} was answered {status}: {answer}")
        elif answer["meta_info"].get("num_retractions"):
            self.counts["retracted witnesses"] += 1
        elif answer["output_ids"] != self.calm[number]:
            self.wrong.append(f"witness {number} has other tokens than on the calm server")
        else:
            self.counts["equal witnesses"] += 1

    async def _sampled(self) -> None:
        options: Body = {
            "temperature": self.rng.choice([0, 0.5, 1.0]),
            "top_p": self.rng.choice([0.9, 1.0]),
            "top_k": self.rng.choice([-1, 20]),
            "max_new_tokens": self._length(LONGEST_OUTPUT),
            "ignore_eos": self.rng.random() < 0.5,
            "stop_token_ids": [self.rng.randrange(VOCABULARY)],
            "min_new_tokens": self.rng.choice([0, 1]),
        }
        prompt = self._prompt()
        options["custom_params"] = {"fairkv": self._wanted(prompt)}
        body = {"input_ids": prompt, "sampling_params": options}
        if self.rng.random() < 0.2:
            body |= {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": 2}
        await self._answered("sampled", body)

    async def _parallel(self) -> None:
        options = {"n": 3, "temperature": 1.0, "max_new_tokens": 12}
        await self._answered("parallel", {"input_ids": self._prompt(), "sampling_params": options})

    async def _answered(self, kind: str, body: Body) -> None:
        status, answer = await self._post("/generate", body)
        if status != 200:
            self.wrong.append(f"a {kind} request was answered {status}: {answer}")
        answers = answer if isinstance(answer, list) else [answer]
        self.counts[kind] += 1
        self.counts["retractions"] += sum(
            one["meta_info"].get("num_retractions") or 0 for one in answers if status == 200
        )

    async def _disconnect(self) -> None:
        """A stream that its client leaves, at any time: queued, in prefill, decoding."""
        body = self._greedy(self._prompt(), self._length(LONGEST_OUTPUT)) | {"stream": True}
        try:
            async with asyncio.timeout(self.rng.random() * 2.0):
                async with self.http.post(self.url + "/generate", json=body) as response:
                    async for _ in response.content:
                        if self.rng.random() < 0.05:
                            break
        except TimeoutError:
            pass
        self.counts["disconnected"] += 1

    async def _abort(self) -> None:
        self._number += 1
        name = f"chaos-{self._number}"
        body = self._greedy(self._prompt(), LONGEST_OUTPUT) | {"rid": name}
        request = asyncio.create_task(self._post("/generate", body))
        await asyncio.sleep(self.rng.random() * 1.5)
        await self._post("/abort_request", {"rid": name})
        await request  # answered all the same, by what there was
        self.counts["aborted"] += 1

    async def _malformed(self) -> None:
        path, data = self.rng.choice(MALFORMED)
        headers = {"Content-Type": "application/json"}
        async with self.http.post(self.url + path, data=data, headers=headers) as response:
            text = await response.text()
            if not 400 <= response.status < 500:
                self.wrong.append(f"{path} {data[:80]!r} was answered {response.status}: {text}")
        self.counts["malformed"] += 1

    async def _chat(self) -> None:
        words = " ".join(self.rng.choices(["red", "green", "blue", "north"], k=40))
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": words}],
            "max_tokens": 8,
            "stream": False,
        }
        status, answer = await self._post("/v1/chat/completions", body)
        if status != 200:
            self.wrong.append(f"a chat was answered {status}: {answer}")
        self.counts["chat"] += 1

    async def _flush(self) -> None:
        await self._post("/flush_cache", {})  # refused while anything runs
        self.counts["flushes"] += 1

    async def _replan(self) -> None:
        await self._post("/set_internal_state", {"server_args": {"fairkv_replan": 1}})
        self.counts["replans asked for"] += 1

    async def _pause(self) -> None:
        mode = self.rng.choice(["in_place", "retract"])
        await self._post("/pause_generation", {"mode": mode})
        await asyncio.sleep(0.3)
        await self._post("/continue_generation", {})
        self.counts[f"pauses ({mode})"] += 1

    async def _info(self) -> None:
        await self._state()
        self.counts["server info"] += 1

    # -- parts --------------------------------------------------------------------------------

    def _length(self, most: int) -> int:
        """From 1 to ``most``, as many short as long ones."""
        return min(most, max(1, round(float(most) ** self.rng.random())))

    def _prompt(self) -> list[int]:
        return self._prefixed(
            [self.rng.randrange(3, VOCABULARY) for _ in range(self._length(LONGEST_PROMPT))]
        )

    def _prefixed(self, prompt: list[int]) -> list[int]:
        return self.rng.choice(self.prefixes) + prompt if self.rng.random() < 0.4 else prompt

    def _wanted(self, prompt: list[int]) -> dict[str, Any] | None:
        """Options for a prompt."""
        return self.rng.choice(SMALL if len(prompt) > LONG_PROMPT else SMALL + LARGE)

    @staticmethod
    def _greedy(prompt: list[int], new_tokens: int, fairkv: dict[str, Any] | None = None) -> Body:
        options: Body = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        if fairkv is not None:
            options["custom_params"] = {"fairkv": fairkv}
        return {"input_ids": prompt, "sampling_params": options}

    async def _post(self, path: str, body: Body) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body) as response:
            text = await response.text()
            try:
                return response.status, json.loads(text)
            except ValueError:
                return response.status, text

    async def _state(self) -> Body:
        async with self.http.get(self.url + "/server_info") as response:
            if response.status != 200:
                raise ChaosFailed(f"/server_info was answered {response.status}")
            state: Body = (await response.json())["internal_states"][0]["fairkv"]
            return state


def start(folder: Path, overlap: bool, tp_size: int = 2) -> ServerProcess:
    """A server in tight memory, with a random copied plan to begin with."""
    model = build(TinyModel(**MODEL), folder)
    arguments = (
        f"--model-path {model} --served-model-name tiny --device cpu --dtype float32 "
        f"--tp {tp_size} --random-seed 1 --fairkv --fairkv-ratio 0.3 --fairkv-arena-pages 1100 "
        "--fairkv-forecast-factor 0.9 "
        f"--fairkv-plan {write_plan(folder, tp_size, 3)}"
    ).split()
    arguments += TIGHT.split() + ([] if overlap else ["--disable-overlap-schedule"])
    return ServerProcess(arguments, folder / f"chaos-{'on' if overlap else 'off'}.log", CHECKS)


def main() -> int:
    """Status 0 if everything held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000, help="of all servers together")
    parser.add_argument("--overlap", choices=("on", "off", "both"), default="both")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    modes = ["on", "off"] if options.overlap == "both" else [options.overlap]
    with tempfile.TemporaryDirectory(prefix="fairkv-chaos-") as name:
        for mode in modes:
            server = start(Path(name), mode == "on")
            try:
                chaos = Chaos(server.url, options.requests // len(modes), options.seed)
                print(json.dumps({"overlap": mode, **asyncio.run(chaos.run())}), flush=True)
            except ChaosFailed as error:
                print(f"overlap {mode}: {error}", file=sys.stderr)
                print("\n".join(server.log.splitlines()[-60:]), file=sys.stderr)
                return 1
            finally:
                server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""A server with OpenAI's completions that looks numbers up; a token is a character."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, ClassVar

END = "\ue000"  # the one special token


class CharacterTokenizer:
    """As much of a Hugging Face tokenizer as ``fairkv eval`` uses."""

    added_tokens_decoder: ClassVar = {0xE000: SimpleNamespace(content=END, special=True)}

    def __init__(self, chat: bool = True) -> None:
        self.chat_template = "there is one" if chat else None

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        text = "".join(map(chr, ids))
        return text.replace(END, "") if skip_special_tokens else text

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        said = "".join(f"[{m['role']}]{m['content']}{END}" for m in messages)
        return said + "[assistant]"


class FakeOpenAI:
    """Answers "What is the magic number of NAME?" from the prompt.

    Attributes:
        requests: Bodies of all completions.
        fairkv: Whether it says that it is a FairKV server, and takes forced tokens.
        window: The option that it says it has.
        forgets: A name whose number it does not find.
        fail_after: Number of completions after which it answers 500.
        logprobs: Whether it gives them.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.fairkv, self.logprobs, self.window = False, True, 32
        self.forgets: set[str] = set()
        self.fail_after: int | None = None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    self._answer(200, {"data": [{"id": "fake"}]})
                elif self.path == "/server_info" and fake.fairkv:
                    state = {"scorer": "snapkv", "scope": "layer", "budget": "25% of the prompt"}
                    state |= {"options": {"window": fake.window}, "profile": None}
                    info = {"enable_custom_logit_processor": True, "tokenizer_path": "here"}
                    self._answer(200, {**info, "internal_states": [{"fairkv": state}]})
                else:
                    self._answer(404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append(body)
                if fake.fail_after is not None and len(fake.requests) > fake.fail_after:
                    self._answer(500, {"error": {"message": "out of\nmemory"}})
                else:
                    self._answer(200, fake.complete(body))

            def _answer(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        forced = (body.get("custom_params") or {}).get("fairkv_forced_ids") or []
        asked = "".join(map(chr, forced))
        whole = "".join(map(chr, body["prompt"])) + asked
        name = re.findall(r"magic number of (\w+)\?", whole)[-1]
        found = re.search(rf"magic number of {name} is (\d+)", whole)
        answer = found[1] if found and name not in self.forgets else "nobody"
        room = body["max_tokens"] - len(forced)
        text = f" It is {answer}.{END}"[:room]
        text += "never read" if body.get("ignore_eos") else ""
        tokens = list(asked + text)
        if not forced:
            text = text.replace(END, "")  # as servers do
        choice: dict[str, Any] = {"text": asked + text, "finish_reason": "stop"}
        if self.logprobs and body.get("logprobs"):
            top = [{token: math.log(0.8), "?": math.log(0.1)} for token in tokens]
            choice["logprobs"] = {"tokens": tokens, "top_logprobs": top}
        return {"choices": [choice]}

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextlib.contextmanager
def fake_openai() -> Iterator[FakeOpenAI]:
    """A server that runs for the block."""
    server = FakeOpenAI()
    try:
        yield server
    finally:
        server.close()

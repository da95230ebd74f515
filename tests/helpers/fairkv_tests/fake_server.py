# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server that answers ``/server_info`` as SGLang with FairKV does."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# As recorded from a server at TP 2 with the names that are stable; numbers shortened.
STATE: dict[str, Any] = {
    "enabled": True,
    "replica": 0,
    "scorer": "snapkv",
    "scope": "layer",
    "budget": "25% of the prompt",
    "placement": "fair_copying",
    "replans": 3,
    "plan_digest": "8f41c2d09be77a35",
    "plan_source": "traffic",
    "plan": {"format": "fairkv-plan", "version": 1},
    "balancedness": 0.957,
    "balancedness_planned": 0.981,
    "rank_loads": [41_000, 37_500],
    "kept_tokens": 102_400,
    "prompt_tokens": 51_200,
    "compactions": 64,
    "kept": {"prompts": 64, "prompt_tokens": 51_200, "tokens": [[9600, 3200], [25_600, 64_000]]},
    "traffic": {"prompts": 32, "prompt_tokens": 25_600, "tokens": [[4800, 1700], [12_000, 32_000]]},
    "ranks": [
        {"rank": 0, "pages": 4096, "pages_charged": 2600, "requests": 12, "lanes": 3},
        {"rank": 1, "pages": 4096, "pages_charged": 2400, "requests": 12, "lanes": 2},
    ],
    "decisions_agree": True,
    "version": "0.1.0",
}


class FakeServer:
    """``state`` may be changed while it runs; None answers as a server without FairKV."""

    def __init__(self, api_key: str | None = None) -> None:
        self.state: dict[str, Any] | None = json.loads(json.dumps(STATE))
        self.body: bytes | None = None  # instead of the state
        self.status = 200
        self.asked = 0
        self._key = api_key
        self._http: ThreadingHTTPServer | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; on the same port when started again."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.asked += 1
                wanted = f"Bearer {fake._key}"
                if fake._key and self.headers.get("Authorization") != wanted:
                    self._answer(401, b'{"error": "Unauthorized"}')
                elif self.path != "/server_info":
                    self._answer(404, b"{}")
                else:
                    self._answer(fake.status, fake.body or fake.answer())

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def answer(self) -> bytes:
        inner = {"fairkv": self.state} if self.state is not None else {}
        info = {"model_path": "models/tiny", "tp_size": 2, "internal_states": [inner]}
        return json.dumps(info).encode()


@contextlib.contextmanager
def fake_server(api_key: str | None = None) -> Iterator[FakeServer]:
    """A server that runs for the block."""
    server = FakeServer(api_key)
    server.start()
    try:
        yield server
    finally:
        server.stop()

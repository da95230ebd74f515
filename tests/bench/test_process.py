# SPDX-License-Identifier: Apache-2.0
"""Which engines are alive, and which of them run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fairkv_sglang.bench.engine import process as module
from fairkv_sglang.bench.engine.process import EngineFailed, EngineProcess, Engines

GIB = 1 << 30


class Fake:
    def __init__(self, name: str) -> None:
        self.name, self.frozen, self.closed = name, False, False

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False

    def close(self) -> None:
        self.closed = True


def pool(capacity: int | None, memory: list[int] | None = None) -> tuple[Engines, list[Any]]:
    made: list[Any] = []
    left = iter(memory or [])

    def start(name: str) -> Any:
        made.append(Fake(name))
        return made[-1]

    return Engines(start, capacity, lambda: next(left, 0)), made


def test_only_the_engine_in_use_runs() -> None:
    engines, made = pool(3)
    for name in ("a", "b", "c", "a"):
        engines.get(name)
    assert [engine.frozen for engine in made] == [False, True, True]
    assert engines.starts == 3
    engines.close()
    assert all(engine.closed for engine in made)


def test_the_engine_used_longest_ago_makes_room() -> None:
    engines, made = pool(2)
    for name in ("a", "b", "a", "c"):
        engines.get(name)
    assert list(engines.alive) == ["a", "c"]
    assert [engine.name for engine in made if engine.closed] == ["b"]


def test_capacity_comes_from_what_the_first_engine_took() -> None:
    engines, _ = pool(None, [20 * GIB, 16 * GIB])
    engines.get("a")
    assert engines.capacity == 3  # 4 GiB and a quarter each, in three quarters of 20 GiB


def test_there_is_room_for_one_in_any_case() -> None:
    for memory, capacity in (([4 * GIB, GIB], 1), ([64 * GIB, 64 * GIB], int(48 / 1.25))):
        engines, _ = pool(None, memory)
        engines.get("a")
        assert engines.capacity == capacity  # a GiB each at least


SCRIPT = """
import sys, time, json
print(json.dumps({"result": "ready"}), flush=True)
for line in sys.stdin:
    if "bad" in sys.argv:
        print(json.dumps({"error": "ValueError: no"}), flush=True)
        continue
    print(json.dumps({"result": json.loads(line)}), flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)
    popen = module.subprocess.Popen

    def start(kind: str = "good") -> EngineProcess:
        def run(command: list[str], **options: Any) -> Any:
            return popen([sys.executable, str(script), kind], **options)

        monkeypatch.setattr(module.subprocess, "Popen", run)
        return EngineProcess(tmp_path / "x.log", {}, measure=False)

    return start


def status_of(engine: EngineProcess) -> str:
    return Path(f"/proc/{engine.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_frozen_engine_is_stopped_and_answers_when_it_is_its_turn(worker: Any) -> None:
    engine = worker()
    try:
        engine.freeze()
        deadline = time.monotonic() + 5
        while status_of(engine) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert status_of(engine) == "T"
        assert engine.call("serve", round=7) == {"method": "serve", "arguments": {"round": 7}}
    finally:
        engine.close()
    assert engine.process.poll() is not None


def test_an_error_of_the_engine_ends_it_and_names_its_log(worker: Any) -> None:
    engine = worker("bad")
    with pytest.raises(EngineFailed, match=r"engine x: ValueError: no; end of .*log"):
        engine.call("serve")
    assert engine.process.poll() is not None


def test_a_frozen_engine_can_be_closed(worker: Any) -> None:
    engine = worker()
    engine.freeze()
    engine.close()
    assert engine.process.poll() is not None

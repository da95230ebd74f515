# SPDX-License-Identifier: Apache-2.0
"""``fairkv top`` in a real pseudo-terminal, and its frames for whatever a server may say."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.cli.main import main
from fairkv_sglang.cli.top_view import View, bar, frame, short
from fairkv_tests.fake_server import STATE, FakeServer
from fairkv_tests.terminal import Terminal

SHOWN = (
    "snapkv, scope layer", "25% of the prompt", "fair_copying from traffic",
    "8f41c2d09be77a35", "3 re-plans", "now 0.957", "planned 0.981", "12 requests", "64 prompts",
    "102K head tokens of 51.2K prompt tokens: 50%", "5000 / 8192 in use: 61%",
    "41.0K", "37.5K", "1.04", "0.96", "2.60K/4.10K",
)  # fmt: skip

Start = Callable[..., Terminal]


@pytest.fixture
def start() -> Iterator[Start]:
    """Terminals that end with the test."""
    made: list[Terminal] = []

    def build(words: list[str], columns: int, rows: int) -> Terminal:
        made.append(Terminal(words, columns, rows))
        return made[-1]

    yield build
    for terminal in made:
        terminal.close()


def _top(server: FakeServer) -> list[str]:
    return ["top", "--url", server.url, "--interval", "0.1"]


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (120, 40)])
def test_live_view(server: FakeServer, start: Start, columns: int, rows: int) -> None:
    terminal = start(_top(server), columns, rows)
    screen = terminal.until(lambda text: "now 0.957" in text)
    for part in SHOWN:
        assert part in screen, part
    assert server.state is not None
    server.state["balancedness"] = 0.5
    server.state["compactions"] = 640
    screen = terminal.until(lambda text: "now 0.500" in text and " - prompts/s" not in text)
    lines = screen.rstrip("\n ").split("\n")
    assert len(lines) <= rows and max(map(len, lines)) <= columns
    assert "█" in screen and "640 prompts" in screen
    terminal.press("q")
    assert terminal.ended() == 0
    assert terminal.restored()


def test_server_that_goes_away_and_comes_back(server: FakeServer, start: Start) -> None:
    terminal = start(_top(server), 80, 24)
    terminal.until(lambda text: "now 0.957" in text)
    server.stop()
    screen = terminal.until(lambda text: "no server answers at" in text)
    assert "now 0.957" in screen  # what was known stays
    assert server.state is not None
    server.state["balancedness"], server.state["compactions"] = 0.75, 1
    server.start()
    screen = terminal.until(lambda text: "now 0.750" in text)
    assert "no server answers" not in screen
    server.state = None
    terminal.until(lambda text: "FairKV is off" in text)
    terminal.press("\x03")
    assert terminal.ended() == 0
    assert terminal.restored()
    assert "Traceback" not in terminal.output


def test_server_that_is_not_there_yet(server: FakeServer, start: Start) -> None:
    server.stop()
    terminal = start(_top(server), 80, 24)
    terminal.until(lambda text: "trying again" in text)
    server.start()
    terminal.until(lambda text: "now 0.957" in text)
    terminal.resize(40, 8)
    terminal.until(lambda text: 0 < max(map(len, text.split("\n"))) <= 40)
    terminal.press("q")
    assert terminal.ended() == 0


def test_one_of_several_replicas(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    second = {**STATE, "replica": 1, "replans": 7}  # which is the first to answer
    states = [{"fairkv": second}, {"fairkv": STATE}]
    server.body = json.dumps({"internal_states": states}).encode()
    once = ["top", "--url", server.url, "--once"]
    assert main(once) == 0 and "replica 0 of 2" in capsys.readouterr().out
    assert main([*once, "--replica", "1"]) == 0
    shown = capsys.readouterr().out
    assert "replica 1 of 2" in shown and "7 re-plans" in shown
    assert main([*once, "--replica", "2"]) == 2
    assert "--replica 2: the server has 2, counted from 0" in capsys.readouterr().err


def test_once_in_a_pipe(server: FakeServer) -> None:
    command = [sys.executable, "-m", "fairkv_sglang.cli.main", "top", "--url", server.url]
    once = subprocess.run([*command, "--once"], capture_output=True, text=True, check=True)
    for part in SHOWN:
        assert part in once.stdout, part
    assert "\x1b" not in once.stdout
    plain = {**os.environ, "PYTHONIOENCODING": "ascii"}
    once = subprocess.run([*command, "--once"], capture_output=True, text=True, env=plain)
    assert once.returncode == 0 and "####" in once.stdout
    live = subprocess.run(command, capture_output=True, text=True)
    assert live.returncode == 2 and "use --once" in live.stderr


def test_refusals(locked_server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    once = ["top", "--url", locked_server.url, "--once"]
    assert main(once) == 2
    assert "wants its API key" in capsys.readouterr().err
    assert main([*once, "--api-key", "secret"]) == 0
    assert main([*once, "--interval", "0"]) == 2
    locked_server.stop()
    capsys.readouterr()
    assert main(once) == 2
    assert "no server answers at" in capsys.readouterr().err


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=200),
    st.lists(
        st.none() | st.integers()
        | st.dictionaries(st.sampled_from(["pages", "rank", "lanes"]), st.none() | st.text()),
        max_size=40,
    ),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(STATE)), JUNK | st.just("absent")),
    st.integers(20, 130), st.integers(3, 45), st.booleans(),
)  # fmt: skip
def test_any_answer_gives_a_frame_that_fits(
    changes: dict[str, Any], width: int, height: int, blocks: bool
) -> None:
    state = copy.deepcopy(STATE)
    for name, value in changes.items():
        state[name] = value
        if value == "absent":
            del state[name]
    view = View("http://127.0.0.1:30000")
    view.answered({"model_path": changes.get("plan", "m")}, state, 0.0)
    lines = frame(view, width, height, blocks).plain.split("\n")
    assert len(lines) <= height
    assert all(len(line) <= width and (line + " ").isprintable() for line in lines)


def test_what_is_missing_is_a_dash() -> None:
    view = View("http://127.0.0.1:30000")
    text = frame(view, 80, 24).plain
    for part in ("now -", "planned -", "- requests, - prompts, - prompts/s", "- / - in use: -"):
        assert part in text
    assert "under way" not in text and "DISAGREE" not in text
    view.answered({}, {"replan_pending": True, "decisions_agree": False}, 0.0)
    assert "re-plans, one under way  RANKS DISAGREE" in frame(view, 80, 24).plain
    view.answered({}, {"rank_loads": [3, 1]}, 0.0)
    text = frame(view, 80, 24).plain
    assert "1.50" in text and "-/-" in text


def test_many_ranks_leave_a_line_that_counts_them() -> None:
    view = View("u")
    view.answered({}, {"rank_loads": list(range(1, 65))}, 0.0)
    lines = frame(view, 80, 24).plain.split("\n")
    assert len(lines) == 24
    shown = sum(line.split()[0].isdigit() for line in lines if line.strip())
    assert f"and {64 - shown} more ranks" in lines[-1]


def test_prompts_per_second() -> None:
    view = View("u")
    assert view.prompts_per_second is None
    for second in range(31):
        view.answered({}, {"compactions": 100 if second < 15 else 100 + 4 * (second - 15)}, second)
    assert view.prompts_per_second == pytest.approx(4.0)
    view.answered({}, {"compactions": 3}, 31.0)  # another server
    assert view.prompts_per_second is None
    view.answered({}, {"compactions": 9}, 33.0)
    assert view.prompts_per_second == pytest.approx(3.0)


@given(st.floats(0, 1), st.integers(1, 60))
def test_bars(part: float, width: int) -> None:
    full, plain = bar(part, width), bar(part, width, blocks=False)
    assert len(full) == len(plain) == width
    assert (part > 0) == bool(full.strip()) == bool(plain.strip())
    assert bar(1.0, width) == "█" * width


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (41_000, "41.0K"), (1_234_567, "1.23M"), (2.5e9, "2.50G"),
     (123_456, "123K"), (None, "-"), ("x", "-"), (float("nan"), "-"), (True, "-")],
)  # fmt: skip
def test_short(value: Any, text: str) -> None:
    assert short(value) == text

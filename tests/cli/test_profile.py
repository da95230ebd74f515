# SPDX-License-Identifier: Apache-2.0
"""``fairkv profile --url``, and what ``fairkv profile`` refuses before it does anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fairkv_sglang.cli.main import main
from fairkv_sglang.profiles import read_profile
from fairkv_tests.fake_server import STATE, FakeServer

Capture = pytest.CaptureFixture[str]


def _refused(words: list[str], capsys: Capture) -> str:
    """The one line of a refusal."""
    assert main(["profile", *words]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith("fairkv profile: error: ")
    return output.err


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_served_counts_become_a_profile(
    server: FakeServer, tmp_path: Path, ending: str, capsys: Capture
) -> None:
    out, png = tmp_path / f"served.{ending}", tmp_path / "served.png"
    words = ["profile", "--url", server.url, "--out", str(out), "--plot", str(png), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 32
    profile = read_profile(out)
    kept = np.array(STATE["traffic"]["tokens"], dtype=float)
    np.testing.assert_allclose(profile.shares, kept / kept.sum())
    assert profile.model == "models/tiny"
    assert profile.meta == {
        "source": "fairkv profile --url",
        "scorer": "snapkv",
        "scope": "layer",
        "budget": "25% of the prompt",
        "version": "0.1.0",
        "prompts": 32,
        "mean_prompt_tokens": 800.0,
    }
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_replicas_add_up(server: FakeServer, tmp_path: Path) -> None:
    other = {**STATE, "traffic": {**STATE["traffic"], "prompts": 8, "prompt_tokens": 800}}
    other["traffic"]["tokens"] = np.flip(STATE["traffic"]["tokens"]).tolist()
    states = [{"fairkv": STATE}, {"fairkv": other}]
    server.body = json.dumps({"model_path": "m", "internal_states": states}).encode()
    assert main(["profile", "--url", server.url, "--out", str(tmp_path / "p.json")]) == 0
    profile = read_profile(tmp_path / "p.json")
    kept = np.array(STATE["traffic"]["tokens"], dtype=float)
    np.testing.assert_allclose(profile.shares, (kept + np.flip(kept)) / (2 * kept.sum()))
    assert profile.meta["prompts"] == 40 and profile.meta["mean_prompt_tokens"] == 26400 / 40


def test_address_without_scheme_and_a_table(
    server: FakeServer, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "p.json"
    assert main(["profile", "--url", f"127.0.0.1:{server.port}/", "--out", str(out)]) == 0
    assert f"32 prompts -> {out}" in capsys.readouterr().out


def test_key(locked_server: FakeServer, tmp_path: Path, capsys: Capture) -> None:
    words = ["--url", locked_server.url, "--out", str(tmp_path / "p.json")]
    assert "wants its API key: --api-key is missing" in _refused(words, capsys)
    assert "is not this server's" in _refused([*words, "--api-key", "wrong"], capsys)
    assert main(["profile", *words, "--api-key", "secret"]) == 0


def test_servers_that_have_nothing_to_say(
    server: FakeServer, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "p.json"
    words = ["--url", server.url, "--out", str(out)]
    assert server.state is not None
    server.state["traffic"] = {"prompts": 0, "prompt_tokens": 0, "tokens": [[0, 0], [0, 0]]}
    assert "no prompt yet" in _refused(words, capsys)
    del server.state["traffic"]
    assert "another version of FairKV?" in _refused(words, capsys)
    server.state = None
    assert "FairKV is off" in _refused(words, capsys)
    for body in (b"hello", b"[]", b'{"internal_states": 3}'):
        server.body = body
        assert "not that of an SGLang server" in _refused(words, capsys)
    server.status = 404
    assert "answers 404" in _refused(words, capsys)
    server.stop()
    assert "no server answers at" in _refused(words, capsys)
    assert not out.exists()


@pytest.mark.parametrize("url", ["http://", "ftp://host", "host:port", "http://[::1", "a b", ""])
def test_what_is_no_address(url: str, tmp_path: Path, capsys: Capture) -> None:
    words = ["--url", url, "--out", str(tmp_path / "p.json")]
    assert "give http://HOST:PORT" in _refused(words, capsys)


def test_output_is_checked_before_the_server_is_asked(
    server: FakeServer, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "folder.json").mkdir()
    url = ["--url", server.url]
    good = ["--out", str(tmp_path / "p.json")]
    for words, message in (
        (["--out", str(tmp_path / "p.txt")], "name it .json or .safetensors"),
        (["--out", str(tmp_path / "p.JSON")], "name it .json or .safetensors"),
        (["--out", str(tmp_path / "no" / "p.json")], "there is no folder"),
        (["--out", str(tmp_path / "folder.json")], "is a folder"),
        ([*good, "--plot", str(tmp_path / "p.json")], "name it .png, .svg or .pdf"),
        ([*good, "--plot", str(tmp_path / "no" / "p.png")], "there is no folder"),
        ([*good, "--ratio", "0.5"], "--ratio is for measuring on prompts"),
        ([*good, "--model-path", "m"], "--model-path is for measuring on prompts"),
    ):
        assert message in _refused([*url, *words], capsys)
    assert server.asked == 0
    # and before a model is loaded
    own = ["--model-path", "m", "--prompts", str(tmp_path / "none")]
    assert "there is no folder" in _refused([*own, "--out", "no/such/p.json"], capsys)
    assert "give --model-path and --prompts, or --url" in _refused(good, capsys)

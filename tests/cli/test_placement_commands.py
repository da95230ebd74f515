# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fairkv_sglang.cli.main import COMMANDS, main
from fairkv_sglang.placement import Plan
from fairkv_sglang.profiles import HeadProfile

PNG = b"\x89PNG"


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    shares = np.random.default_rng(0).lognormal(0, 1, (4, 4))
    path = tmp_path / "profile.json"
    HeadProfile("tiny", shares).save(path)
    return path


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    kept = 4128 + np.random.default_rng(1).lognormal(0, 1, (6, 4, 4)).round(2) * 100
    samples = [[1000 + i, 32, 1032 + i, 4096] for i in range(6)]
    path = tmp_path / "requests.json"
    path.write_text(json.dumps({"kept": kept.tolist(), "samples": samples}))
    return path


def test_plan_writes_plan_and_picture(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    words = ["plan", str(profile), "--tp", "4", "--out", str(out), "--png", str(png)]
    assert main([*words, "--fairkv-expected-batch", "128"]) == 0
    text = capsys.readouterr().out
    for part in ("contiguous", "best_effort", "fair_copying", "batch 128", str(out)):
        assert part in text
    plan = Plan.from_file(out)
    assert (plan.policy, plan.model, plan.tp_size, plan.num_layers) == (
        "fair_copying",
        "tiny",
        4,
        4,
    )
    assert png.read_bytes()[:4] == PNG


def test_plan_json_is_one_document(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(profile), "--tp", "2", "--json", "--policy", "exact", "--compare", ""]
    assert main(words) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data["policies"]) == ["exact"]
    assert data["policies"]["exact"]["step_over_bound"] >= 1.0
    assert 0 < data["policies"]["exact"]["home_rows"] <= 1
    assert data["settings"]["load model"]["batch"] == 32.0


def test_copies_can_be_limited(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copies = []
    for flags in ([], ["--fairkv-max-copies", "0"]):
        words = ["plan", str(profile), "--tp", "4", "--json", "--fairkv-expected-batch", "256"]
        assert main([*words, *flags]) == 0
        data = json.loads(capsys.readouterr().out)
        copies.append(data["policies"]["fair_copying"]["copies_per_layer"])
    assert copies[0] > copies[1] == 0.0


def test_plan_takes_sizes_from_the_model_config(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    words = ["plan", str(profile), "--tp", "2", "--json", "--model-path", str(tmp_path)]
    assert main(words) == 0
    sizes = json.loads(capsys.readouterr().out)["settings"]["load model"]
    assert (sizes["group"], sizes["head_dim"], sizes["hidden_size"]) == (2, 32, 256)


def test_plan_takes_everything_by_flag(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Short forms of the server's flags: --profile, --policy."""
    config = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    out = tmp_path / "plan.json"
    words = ["plan", "--profile", str(profile), "--model-path", str(tmp_path), "--tp", "2"]
    flags = ["--policy", "fair_copying", "--out", str(out)]
    assert main([*words, *flags]) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines() if line[:1] in "┏│└"), text
    for name in ("max/mean: ", "step: ", "lanes: "):
        assert f"  {name}" in text
    data = json.loads(out.read_text())
    assert (data["format"], data["version"], data["tp_size"]) == ("fairkv-plan", 1, 2)


def test_plot(profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", str(profile), "--tp", "2", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["plot", str(out), "--profile", str(profile), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert Path(data["png"]).read_bytes()[:4] == PNG


def test_simulate(requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "replay.png"
    words = ["simulate", str(requests), "--tp", "2", "4", "--steps", "20", "--batch", "8"]
    assert main([*words, "--png", str(png), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    by_name = {(r["tp"], r["policy"]): max(r["imbalance"]) for r in results}
    assert by_name[4, "fair_copying"] < by_name[4, "contiguous"]
    assert png.read_bytes()[:4] == PNG
    assert main([*words, "--policies", "contiguous"]) == 0
    assert "held out" in capsys.readouterr().out


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_text_works_in_a_pipe_that_closes(profile: Path, unbuffered: str) -> None:
    command = [sys.executable, "-m", "fairkv_sglang.cli.main", "plan", str(profile), "--tp", "2"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(60) == 0
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "missing.json", "--tp", "2"], "there is no file 'missing.json'"),
        (["plan", "--tp", "2"], "give a model (--model-path) or a head profile"),
        (["plan", "PROFILE", "--profile", "PROFILE", "--tp", "2"], "give one head profile"),
        (["plan", "PROFILE", "--tp", "2", "--out", "no/such/folder/x.json"], "no/such/folder"),
        (["plan", "PROFILE", "--tp", "0"], "--tp-size 0 must be at least 1"),
        (["plan", "PROFILE", "--tp", "3"], "cannot be split over 3 ranks; use 1 or 2 or 4 or 8"),
        (["plan", "PROFILE", "--tp", "2", "--fairkv-budget", "0"], "must be greater than 0"),
        (
            ["plan", "PROFILE", "--tp", "2", "--fairkv-expected-batch", "0"],
            "must be greater than 0",
        ),
        (["plan", "PROFILE", "--tp", "2", "--policy", "fair_copy"], "did you mean fair_copying?"),
        (["plan", "PROFILE", "--tp", "2", "--model-path", "x"], "cannot read model config x"),
        (["plan", "PROFILE", "--tp", "2", "--png", "x.txt"], "name it .png"),
        (["plan", "PROFILE", "--tp", "2", "--compare", "best"], "unknown placement policy 'best'"),
        (
            ["plan", "PROFILE", "--tp", "2", "--fairkv-budgets", "9"],
            "there is no flag --fairkv-budgets: did you mean --fairkv-budget?",
        ),
        (["simulate", "PROFILE", "--tp=2", "--step", "9"], "no flag --step: did you mean --steps?"),
        (["plot", "PROFILE"], "not a plan"),
        (["simulate", "PROFILE"], "not a file of requests"),
    ],
)
def test_wrong_input_gives_one_line(
    words: list[str], message: str, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(profile) if word == "PROFILE" else word for word in words]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith(f"fairkv {words[0]}: error: ")
    assert errors.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("fairkv-sglang 0.")


def test_a_wrong_command_line_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["plans"], ["plan", "--tp", "two"], []):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_flags_stand_after_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "check"]) == 2
    assert capsys.readouterr().err == "fairkv: error: there is no flag --json\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)

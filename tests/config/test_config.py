# SPDX-License-Identifier: Apache-2.0
"""The configuration: every source, precedence, round trip, and messages for wrong input."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairkv_sglang.config import (
    FILE_VARIABLE,
    RESOLVED_VARIABLE,
    ConfigError,
    FairKVConfig,
    add_flags,
    from_environment,
    from_flags,
    from_mapping,
    merge,
    read_file,
)


def _parse(*argv: str, **environment: str) -> FairKVConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(parser.parse_args(argv), environment)


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_are_off() -> None:
    """No flag, no variable: FairKV is off and every field has its default."""
    assert _parse() == FairKVConfig()
    assert not FairKVConfig().enabled


def test_every_field_has_a_flag_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The model's fields are the only source of flags."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = " ".join(parser.format_help().split())
    for name, field in FairKVConfig.model_fields.items():
        flag = "--fairkv" if name == "enabled" else f"--fairkv-{name.replace('_', '-')}"
        assert flag in text
        assert field.description
    assert "FairKV" in text


def test_flags_win_over_file_over_environment(tmp_path: Path) -> None:
    """Precedence, with one field from each place."""
    file = _write(tmp_path / "a.yaml", "window: 16\nscorer: streaming\nsink: 2\n")
    environment = _write(
        tmp_path / "b.json", json.dumps({"window": 8, "sink": 1, "pooling": "avg"})
    )
    config = _parse(
        "--fairkv", "--fairkv-config", file, "--fairkv-window", "24", **{FILE_VARIABLE: environment}
    )
    assert (config.window, config.sink, config.pooling, config.scorer) == (
        24,
        2,
        "avg",
        "streaming",
    )


def test_budget_of_a_flag_replaces_ratio_of_a_file(tmp_path: Path) -> None:
    """Budget and ratio are one decision: the later source takes it."""
    file = _write(tmp_path / "a.yaml", "ratio: 0.5\n")
    config = _parse("--fairkv", "--fairkv-config", file, "--fairkv-budget", "100")
    assert (config.budget, config.ratio, config.effective_ratio) == (100, None, None)
    assert merge([{"budget": 4}, {"ratio": 0.1}]) == {"ratio": 0.1}


def test_a_quarter_is_kept_unless_told_otherwise() -> None:
    """The default ratio applies only when there is no budget."""
    assert FairKVConfig().effective_ratio == 0.25
    assert FairKVConfig(ratio=0.5).effective_ratio == 0.5


def test_file_of_the_environment_turns_fairkv_on(tmp_path: Path) -> None:
    """FAIRKV_CONFIG alone is enough, and `enabled: false` in the file turns it off."""
    on = _write(tmp_path / "on.yaml", "budget: 64\n")
    config = from_environment({FILE_VARIABLE: on})
    assert config is not None and config.enabled and config.budget == 64
    off = _write(tmp_path / "off.yaml", "enabled: false\n")
    config = from_environment({FILE_VARIABLE: off})
    assert config is not None and not config.enabled
    assert from_environment({}) is None


def test_paths_of_a_file_are_relative_to_it(tmp_path: Path) -> None:
    """A configuration can be moved together with its profile."""
    (tmp_path / "profile.json").touch()
    file = _write(tmp_path / "a.yaml", "profile: profile.json\n")
    assert from_mapping(read_file(file)).profile == (tmp_path / "profile.json").resolve()


_VALUES = st.fixed_dictionaries(
    {},
    optional={
        "enabled": st.booleans(),
        "ratio": st.floats(0.01, 1.0),
        "scorer": st.sampled_from(["snapkv", "streaming"]),
        "window": st.integers(1, 512),
        "kernel_size": st.integers(0, 50).map(lambda n: 2 * n + 1),
        "floor_alpha": st.floats(0, 1),
        "scope": st.sampled_from(["uniform", "layer", "rank"]),
        "max_copies": st.integers(0, 64),
        "prefill_pool": st.integers(1, 1 << 30),
        "log_decisions": st.booleans(),
    },
)


@given(_VALUES)
def test_children_read_what_the_parent_wrote(values: dict[str, object]) -> None:
    """The environment round trip loses nothing."""
    config = from_mapping(values)
    assert from_environment({RESOLVED_VARIABLE: config.to_json()}) == config


@given(_VALUES)
def test_flags_and_mapping_agree(values: dict[str, object]) -> None:
    """The same values as flags and as a dictionary make the same configuration."""
    argv = ["--fairkv"]
    for name, value in values.items():
        flag = f"--fairkv-{name.replace('_', '-')}"
        if name != "enabled" and value is not False:
            argv += [flag] if value is True else [flag, str(value)]
    assert _parse(*argv) == from_mapping({**values, "enabled": True})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--fairkv", "--fairkv-scope", "layr"], ["--fairkv-scope", "'layr'", "layer", "uniform"]),
        (["--fairkv", "--fairkv-scorer", "h2o"], ["--fairkv-scorer", "snapkv", "streaming"]),
        (["--fairkv", "--fairkv-placement", "best"], ["fair_copying", "best_effort", "contiguous"]),
        (["--fairkv", "--fairkv-budget", "many"], ["--fairkv-budget", "'many'", "whole number"]),
        (["--fairkv", "--fairkv-budget", "0"], ["--fairkv-budget", "greater than 0"]),
        (["--fairkv", "--fairkv-budget", "12"], ["12", "window 32", "at least 33"]),
        (["--fairkv", "--fairkv-scorer", "streaming", "--fairkv-budget", "33"], ["sink 4", "36"]),
        (["--fairkv", "--fairkv-ratio", "1.5"], ["--fairkv-ratio", "at most 1"]),
        (["--fairkv", "--fairkv-ratio", "nan"], ["--fairkv-ratio", "not a number"]),
        (["--fairkv", "--fairkv-ratio", ".5", "--fairkv-budget", "64"], ["exclude each other"]),
        (["--fairkv", "--fairkv-kernel-size", "4"], ["4 is even", "5"]),
        (["--fairkv", "--fairkv-scope", "head"], ["scope head", "profile", "layer"]),
        (["--fairkv", "--fairkv-profile", "/no/such/file"], ["/no/such/file", "no file"]),
        (["--fairkv", "--fairkv-config", "/no/such/file"], ["/no/such/file", "No such file"]),
        (["--fairkv-budget", "64"], ["--fairkv-budget", "off", "add --fairkv"]),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(argv: list[str], words: list[str]) -> None:
    """What is wrong and what would be right, in one line."""
    with pytest.raises(ConfigError) as caught:
        _parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bugdet: 64", ["'bugdet'", "did you mean budget"]),
        ("- 1\n- 2", ["must map"]),
        ("window: [1", ["cannot be read"]),
        ("window: true", ["window", "switch"]),
        ("window: 3.5", ["window", "whole number"]),
        ("scope: head", ["profile"]),
        ("budget: 100\nratio: 0.5", ["exclude each other"]),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, text: str, words: list[str]) -> None:
    """The message names the file and the key."""
    file = _write(tmp_path / "fairkv.yaml", text)
    with pytest.raises(ConfigError) as caught:
        _parse("--fairkv", "--fairkv-config", file)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_config_flag_without_switch_needs_enabled_in_the_file(tmp_path: Path) -> None:
    """A file that says `enabled: true` is as good as the switch; one that does not is an error."""
    assert _parse("--fairkv-config", _write(tmp_path / "a.yaml", "enabled: true\n")).enabled
    with pytest.raises(ConfigError, match="add --fairkv"):
        _parse("--fairkv-config", _write(tmp_path / "b.yaml", "window: 16\n"))


def test_it_cannot_be_changed() -> None:
    """Frozen: what was validated is what is used."""
    with pytest.raises(ValueError, match="frozen"):
        FairKVConfig().window = 3  # type: ignore[misc]


def test_choices_are_those_of_the_registries() -> None:
    """A new scorer, scope or policy must be selectable."""
    import typing

    from fairkv_sglang.budgets import SCOPES, SCORERS
    from fairkv_sglang.placement import POLICIES

    for field, registry in (("scorer", SCORERS), ("scope", SCOPES), ("placement", POLICIES)):
        choices = typing.get_args(FairKVConfig.model_fields[field].annotation)
        assert sorted(choices) == sorted(registry)

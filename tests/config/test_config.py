# SPDX-License-Identifier: Apache-2.0
"""The configuration: every source, precedence, round trip, and messages for wrong input."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.budgets import SCOPES, SCORERS
from fairkv_sglang.config import (
    FILE_VARIABLE,
    RESOLVED_VARIABLE,
    ConfigError,
    FairKVConfig,
    add_flags,
    fields,
    from_environment,
    from_flags,
    from_mapping,
    merge,
    read_file,
)
from fairkv_sglang.placement import POLICIES
from fairkv_sglang.planning import budget_text, make_budgets


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
    for name, _, sentence in fields():
        flag = "" if name == "enabled" else f"-{name.replace('_', '-').replace('.', '-')}"
        assert f"--fairkv{flag}" in text
        assert len(sentence) > 10
    for method in (*SCORERS.values(), *SCOPES.values(), *POLICIES.values()):
        assert f"{method.name} = {method.summary}" in text
    assert "snapkv: Width of the pooling" in text and "--fairkv-pooling {max,avg}" in text
    assert "FairKV" in text


def test_flags_win_over_file_over_environment(tmp_path: Path) -> None:
    """Precedence, with one field from each place."""
    file = _write(tmp_path / "a.yaml", "window: 16\nscorer: streaming\nsink: 2\n")
    environment = _write(
        tmp_path / "b.json", json.dumps({"window": 8, "floor_alpha": 0.5, "pooling": "avg"})
    )
    config = _parse(
        "--fairkv", "--fairkv-config", file, "--fairkv-window", "24", **{FILE_VARIABLE: environment}
    )
    assert (config.window, config.sink, config.floor_alpha, config.scorer) == (
        24,
        2,
        0.5,
        "streaming",
    )
    # The pooling went with the scorer that the environment's file was written for.
    assert config.options("scorer") == {"window": 24, "sink": 2}


def test_budget_of_a_flag_replaces_ratio_of_a_file(tmp_path: Path) -> None:
    """Budget and ratio are one decision: the later source takes it."""
    file = _write(tmp_path / "a.yaml", "ratio: 0.5\n")
    config = _parse("--fairkv", "--fairkv-config", file, "--fairkv-budget", "100")
    assert (config.budget, config.ratio, config.effective_ratio) == (100, None, None)
    assert merge([{"budget": 4}, {"ratio": 0.1}]) == {"ratio": 0.1}
    bounded = {"ratio": 0.2, "budget_least": 100, "budget_most": 900}
    assert merge([bounded, {"budget": 64}]) == {"budget": 64}
    assert merge([bounded, {"ratio": 0.1}]) == {**bounded, "ratio": 0.1}
    config = _parse("--fairkv", "--fairkv-budget-least", "100", "--fairkv-budget-most", "900")
    assert budget_text(config) == "25% of the prompt, at least 100 tokens, at most 900 tokens"
    assert budget_text(from_mapping({"ratio": 0.125})) == "12.5% of the prompt"
    assert budget_text(from_mapping({"ratio": 0.07})) == "7% of the prompt"
    assert make_budgets(config, 2, 2)[1].budget(2000) == 500


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
        "window": st.integers(1, 512),
        "kernel_size": st.integers(0, 50).map(lambda n: 2 * n + 1),
        "floor_alpha": st.floats(0, 1),
        "scope": st.sampled_from(["layer", "rank"]),
        "max_copies": st.integers(0, 64),
        "prefill_pool": st.integers(1, 1 << 30),
        "debug": st.fixed_dictionaries({"log_decisions": st.booleans()}),
    },
)


@settings(deadline=None)
@given(_VALUES)
def test_children_read_what_the_parent_wrote(values: dict[str, object]) -> None:
    """The environment round trip loses nothing."""
    config = from_mapping(values)
    assert from_environment({RESOLVED_VARIABLE: config.to_json()}) == config


@settings(deadline=None)
@given(_VALUES)
def test_flags_and_mapping_agree(values: dict[str, object]) -> None:
    """The same values as flags and as a dictionary make the same configuration."""
    argv = ["--fairkv"]
    for name, value in (values | values.get("debug", {})).items():
        flag = f"--fairkv-{name.replace('_', '-')}"
        if name not in ("enabled", "debug") and value is not False:
            argv += [flag] if value is True else [flag, str(value)]
    assert _parse(*argv) == from_mapping({**values, "enabled": True})


_OUTPUTS = ["--fairkv", "--fairkv-budget", "512", "--fairkv-decode-compression"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--fairkv", "--fairkv-scope", "layr"], ["--fairkv-scope", "'layr'", "layer", "uniform"]),
        (["--fairkv", "--fairkv-scorer", "h3o"], ["--fairkv-scorer", "snapkv", "streaming"]),
        (["--fairkv", "--fairkv-placement", "best"], ["fair_copying", "best_effort", "contiguous"]),
        (["--fairkv", "--fairkv-budget", "many"], ["--fairkv-budget", "'many'", "whole number"]),
        (["--fairkv", "--fairkv-budget", "0"], ["--fairkv-budget", "greater than 0"]),
        (["--fairkv", "--fairkv-budget", "12"], ["12", "window 32", "at least 33"]),
        (["--fairkv", "--fairkv-scorer", "streaming", "--fairkv-budget", "33"], ["sink 4", "36"]),
        (["--fairkv", "--fairkv-ratio", "1.5"], ["--fairkv-ratio", "at most 1"]),
        (["--fairkv", "--fairkv-ratio", "nan"], ["--fairkv-ratio", "not a number"]),
        (["--fairkv", "--fairkv-ratio", ".5", "--fairkv-budget", "64"], ["exclude each other"]),
        (["--fairkv", "--fairkv-budget", "64", "--fairkv-budget-most", "90"], ["go with a ratio"]),
        (["--fairkv", "--fairkv-budget-most", "12"], ["budget_most", "12", "at least 33"]),
        (
            ["--fairkv", "--fairkv-budget-least", "99", "--fairkv-budget-most", "98"],
            ["99 is above", "98"],
        ),
        (["--fairkv", "--fairkv-kernel-size", "4"], ["4 is even", "5"]),
        (["--fairkv", "--fairkv-scope", "head"], ["scope head", "profile", "layer"]),
        (["--fairkv", "--fairkv-profile", "/no/such/file"], ["/no/such/file", "no file"]),
        (["--fairkv", "--fairkv-config", "/no/such/file"], ["/no/such/file", "No such file"]),
        (
            ["--fairkv", "--fairkv-scorer", "streaming", "--fairkv-kernel-size", "5"],
            ["--fairkv-kernel-size: scorer streaming has no such option; snapkv has it"],
        ),
        (
            ["--fairkv", "--fairkv-placement", "contiguous", "--fairkv-max-copies", "1"],
            ["--fairkv-max-copies: placement contiguous", "equal_shares, exact, fair_copying"],
        ),
        (
            ["--fairkv", "--fairkv-scope", "uniform", "--fairkv-floor-alpha", "1"],
            ["--fairkv-floor-alpha: scope uniform", "head, layer, model, rank, threshold have it"],
        ),
        (["--fairkv", "--fairkv-pooling", "mix"], ["--fairkv-pooling", "'mix'", "max, avg"]),
        (["--fairkv", "--fairkv-sink", "4"], ["--fairkv-sink: scorer snapkv", "streaming"]),
        (["--fairkv", "--fairkv-window", "0"], ["--fairkv-window", "greater than 0"]),
        (
            ["--fairkv", "--fairkv-debug-arena-pages", "0"],
            ["--fairkv-debug-arena-pages", "greater than 0"],
        ),
        (["--fairkv-budget", "64"], ["--fairkv-budget", "off", "add --fairkv"]),
        (["--fairkv", "--fairkv-decode-compression"], ["give budget, or budget_least"]),
        (
            ["--fairkv", "--fairkv-decode-compression", "--fairkv-ratio", "1"],
            ["ratio of 1 keeps everything"],
        ),
        (
            [*_OUTPUTS, "--fairkv-decode-slack", "40"],
            ["--fairkv-decode-slack", "multiple of 16"],
        ),
        ([*_OUTPUTS, "--fairkv-decode-slack", "16"], ["--fairkv-decode-slack", "at least 32"]),
        ([*_OUTPUTS, "--fairkv-decode-window", "33"], ["window 32", "give at most 32"]),
        ([*_OUTPUTS, "--fairkv-decode-redundancy", "2"], ["redundancy", "at most 1"]),
        (
            [*_OUTPUTS, "--fairkv-decode-redundancy", ".9"],
            ["add decode_scorer attention"],
        ),
        ([*_OUTPUTS, "--fairkv-decode-scorer", "h2o"], ["--fairkv-decode-scorer", "keydiff"]),
        (["--fairkv", "--fairkv-decode-slack", "64"], ["decode_slack", "add decode_compression"]),
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
        ("kernel_sise: 3", ["did you mean kernel_size"]),
        ("debug: 3", ["debug"]),
        ("debug: {arena_page: 3}", ["debug-arena-page", "no such option"]),
        ("scorer: streaming\npooling: avg", ["pooling: scorer streaming has no such option"]),
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


def test_outputs_are_compressed_within_a_budget_in_tokens() -> None:
    """Given outright, or as the least of a share; the queries of no token are kept without."""
    attention = ["--fairkv-decode-scorer", "attention"]
    assert _parse(*_OUTPUTS, *attention).recent_queries == 8
    least = ["--fairkv", "--fairkv-decode-compression", "--fairkv-budget-least", "256"]
    assert _parse(*least, *attention, "--fairkv-decode-window", "1").recent_queries == 1
    assert _parse(*least).recent_queries == _parse("--fairkv").recent_queries == 0


def test_switches_for_tests_stand_under_debug(tmp_path: Path) -> None:
    """All spellings mean the same, and layers join."""
    config = FairKVConfig(arena_pages=7, debug={"log_decisions": True})
    assert (config.debug.arena_pages, config.debug.log_decisions) == (7, True)
    file = _write(tmp_path / "a.yaml", "debug: {arena_pages: 9}\n")
    for flag in ("--fairkv-debug-log-decisions", "--fairkv-log-decisions"):
        debug = _parse("--fairkv", "--fairkv-config", file, flag).debug
        assert (debug.arena_pages, debug.log_decisions) == (9, True)


def test_another_method_takes_the_options_that_both_have() -> None:
    """As `fairkv plan` compares policies."""
    config = FairKVConfig(
        placement="equal_shares", max_copies=2, window=16, sink=1, scorer="streaming"
    )
    assert config.with_method("placement", "fair_copying").options("placement") == {"max_copies": 2}
    assert config.with_method("placement", "contiguous").options("placement") == {}
    other = config.with_method("scorer", "snapkv")
    assert other.options("scorer") == {
        "window": 16,
        "kernel_size": 7,
        "pooling": "max",
        "group": "mean",
    }
    assert other.make_scorer() == SCORERS["snapkv"](window=16)


def test_tables_in_the_docs_are_those_of_the_registries() -> None:
    """`python -m fairkv_sglang.config.tables` writes them."""
    from fairkv_sglang.config.tables import PAGES, filled

    docs = Path(__file__).resolve().parents[2] / "docs"
    for page in PAGES:
        text = (docs / page).read_text(encoding="utf-8")
        assert filled(text) == text, f"docs/{page}: run python -m fairkv_sglang.config.tables"

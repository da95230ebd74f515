# SPDX-License-Identifier: Apache-2.0
"""Which configuration a start uses and what its children are told."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from fairkv_sglang.config import (
    FILE_VARIABLE,
    RESOLVED_VARIABLE,
    ConfigError,
    FairKVConfig,
    add_flags,
    from_environment,
)
from fairkv_sglang.model import PRESETS
from fairkv_sglang.patches import server_args


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.delenv(RESOLVED_VARIABLE, raising=False)
    monkeypatch.setattr(server_args._State, "command_line", None)
    yield


def _children() -> FairKVConfig | None:
    """What a child would read if it were started now."""
    server_args._export(server_args._configuration())
    return from_environment()


def _file(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def _command_line(*argv: str) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    server_args.before_from_cli_args(object, parser.parse_args(argv))


def test_nothing_asked_leaves_the_environment_alone() -> None:
    """FairKV off: children see no variable at all."""
    assert _children() is None


def test_engine_configuration_lasts_for_its_start_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next engine of the same process starts from scratch."""
    with server_args.starting(FairKVConfig(enabled=True, budget=64)):
        assert _children() == FairKVConfig(enabled=True, budget=64)
    assert from_environment() is None
    assert _children() is None


def test_engine_can_be_off_beside_a_file_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Children must not fall back to the file."""
    monkeypatch.setenv(FILE_VARIABLE, _file(tmp_path / "a.yaml", "budget: 64\n"))
    with server_args.starting(FairKVConfig(enabled=False)):
        assert _children() == FairKVConfig(enabled=False)
    with server_args.starting(None):
        assert _children() == FairKVConfig(enabled=True, budget=64)


def test_a_later_file_is_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What an earlier start exported is not taken for the user's word."""
    monkeypatch.setenv(FILE_VARIABLE, _file(tmp_path / "a.yaml", "budget: 64\n"))
    assert _children() == FairKVConfig(enabled=True, budget=64)
    monkeypatch.setenv(FILE_VARIABLE, _file(tmp_path / "b.yaml", "budget: 96\n"))
    assert _children() == FairKVConfig(enabled=True, budget=96)
    monkeypatch.delenv(FILE_VARIABLE)
    assert _children() == FairKVConfig(enabled=False)


def test_engine_wins_over_a_command_line_parsed_before() -> None:
    """A tool that parses SGLang's flags and then starts a FairKV engine gets FairKV."""
    _command_line()
    with server_args.starting(FairKVConfig(enabled=True, budget=64)):
        assert _children() == FairKVConfig(enabled=True, budget=64)


def test_command_line_wins_over_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Flags on top of the user's file reach the children as one configuration."""
    monkeypatch.setenv(FILE_VARIABLE, _file(tmp_path / "a.yaml", "budget: 64\nwindow: 16\n"))
    _command_line("--fairkv-budget", "96")
    assert _children() == FairKVConfig(enabled=True, budget=96, window=16)


def test_wrong_flags_end_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2 and one line."""
    with pytest.raises(SystemExit) as caught:
        _command_line("--fairkv", "--fairkv-ratio", "2")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --fairkv-ratio: 2 must be at most 1.0\n"


@pytest.mark.parametrize(
    ("scorer", "message"),
    [("kvzip", "needs the tokenizer"), ("keydiff", "--device cpu with FairKV")],  # what comes next
)
def test_scorer_in_words_is_refused_without_a_tokenizer(scorer: str, message: str) -> None:
    arguments = SimpleNamespace(
        tp_size=1,
        device="cpu",
        skip_tokenizer_init=True,
        disaggregation_mode="null",
        disaggregation_transfer_backend="mooncake",
    )
    with (
        mock.patch("fairkv_sglang.patches.cpu_platform.is_active", lambda: False),
        server_args.starting(FairKVConfig(enabled=True, scorer=scorer)),
        pytest.raises(ConfigError, match=message),
    ):
        server_args._resolve(None, arguments)


@pytest.mark.parametrize(
    ("hybrid", "error", "message"),
    [(True, ConfigError, "hybrids of attention"), (False, AssertionError, "for SGLang alone")],
)
def test_a_model_that_is_not_served_is_refused_where_sglang_fails_over_it(
    monkeypatch: pytest.MonkeyPatch, hybrid: bool, error: type[Exception], message: str
) -> None:
    """SGLang asserts what some kinds of models need of a machine."""
    for name in ("_check_devices", "_settle"):
        monkeypatch.setattr(server_args, name, lambda _: None)
    model = replace(PRESETS["tiny"], hybrid=hybrid)
    monkeypatch.setattr(server_args, "read_model", lambda _: model)
    monkeypatch.setattr("fairkv_sglang.patches.cpu_platform.is_active", lambda: False)
    arguments = SimpleNamespace(
        model_path="model",
        device="cuda",
        disaggregation_mode="null",
        disaggregation_transfer_backend="mooncake",
    )
    resolve = mock.Mock(side_effect=AssertionError("for SGLang alone"))
    with (
        server_args.starting(FairKVConfig(enabled=True)),
        pytest.raises(error, match=message),
    ):
        server_args._resolve(resolve, arguments)

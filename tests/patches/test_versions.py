# SPDX-License-Identifier: Apache-2.0
"""Which SGLang will do, said in one line before anything of it runs; where the plugin does what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang  # noqa: F401  brings its platform, which must precede its other modules

from fairkv_sglang import plugin
from fairkv_sglang.config import FILE_VARIABLE, ConfigError
from fairkv_sglang.patches import ledger, processes, versions
from fairkv_tests.engine_process import LAUNCH

RANGE = f"FairKV needs {versions.OLDEST} to {versions.NEWEST}"


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``found("0.5.20")``: that SGLang is installed."""

    def set_version(version: str) -> None:
        monkeypatch.setattr(versions, "installed", lambda: version)

    return set_version


@pytest.mark.parametrize(
    "version", ["0.5.21", "0.5.21.post1", "0.5.22", "0.5.23", "0.5.23rc1+cpu", "0.5.22.dev3+g12"]
)
def test_supported(found: Any, version: str) -> None:
    found(version)
    assert versions.check() == version


@pytest.mark.parametrize("version", ["0.5.20", "0.5.9", "0.4.99", "0.5.24", "0.6", "1.0.0", "main"])
def test_too_old_or_too_new(found: Any, version: str) -> None:
    found(version)
    with pytest.raises(ConfigError, match=f"SGLang {version} is not supported: {RANGE}"):
        versions.check()


def _with_sglang(version: str, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with metadata of another SGLang found first."""
    info = folder / f"sglang-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    return subprocess.run(
        [sys.executable, *command],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", ""))),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ((str(LAUNCH), "--fairkv"), 2),
        (("-m", "fairkv_sglang.cli.main", "check"), 2),
        (("-m", "fairkv_sglang.cli.main", "check", "--", "--model-path", "m", "--fairkv"), 2),
        (("-c", "from fairkv_sglang import Engine"), 1),
        (("-m", "sglang.launch_server", "--model-path", "m", "--fairkv-ratio", "0.5"), 2),
    ],
    ids=["launch", "check", "check-flags", "engine", "plugin"],
)
def test_every_way_of_starting_says_so_first(
    tmp_path: Path, command: tuple[str, ...], status: int
) -> None:
    done = _with_sglang("0.5.20", tmp_path, *command)
    assert done.returncode == status
    last = done.stderr.strip().splitlines()[-1]
    assert f"SGLang 0.5.20 is not supported: {RANGE}" in last
    assert "Traceback" not in done.stderr or status == 1


def test_unsupported_and_not_asked_for_the_plugin_is_inert(
    found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found("0.5.20")
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "argv", ["sglang", "--model-path", "m"])
    monkeypatch.setattr(ledger, "register", lambda hooks: pytest.fail("registers hooks"))
    plugin.register()


@pytest.mark.parametrize(
    ("module", "is_rank"),
    [
        ("sglang.srt.managers.scheduler", True),
        ("sglang.srt.managers.detokenizer_manager", False),
        ("sglang.srt.managers.data_parallel_controller", False),
        ("sglang.srt.entrypoints.engine", False),
    ],
)
def test_only_a_rank_gets_the_hooks_of_ranks(
    monkeypatch: pytest.MonkeyPatch, module: str, is_rank: bool
) -> None:
    """From 0.5.22 on SGLang loads plugins in processes that run no model, too."""
    registered: list[Any] = []
    monkeypatch.setattr(ledger, "register", registered.extend)
    monkeypatch.setattr(processes, "register", registered.extend)
    monkeypatch.setattr(processes, "_is_rank", False)  # put back afterwards
    monkeypatch.setenv("FAIRKV_RESOLVED", '{"enabled": true}')
    caller: dict[str, Any] = {"__name__": module, "load": plugin.register}
    exec("def run_process(): load()", caller)
    caller["run_process"]()
    targets = {hook.target for hook in registered}
    assert "sglang.srt.server_args.ServerArgs.add_cli_args" in targets
    assert ("sglang.srt.managers.scheduler.Scheduler.__init__" in targets) == is_rank


@pytest.mark.parametrize("version", ["0.5.21", "0.5.22", "0.5.23"])
def test_a_request_lets_go_of_its_prefix(found: Any, version: str) -> None:
    found(version)
    calls: list[Any] = []
    cache = SimpleNamespace(unpin=calls.append, unlock=calls.append)
    req = SimpleNamespace(last_node=7, lock="lock", prefix_indices="slots")
    versions.let_go_of_prefix(cache, req)
    assert req.last_node is None
    if version == "0.5.21":
        assert calls == [req] and req.prefix_indices.numel() == 0
    else:
        assert calls == ["lock"] and req.lock is None


@pytest.mark.parametrize("version", ["0.5.22", "0.5.23"])
def test_disaggregation_runs_where_it_was_tried(found: Any, version: str) -> None:
    found("0.5.21")
    versions.check_disaggregation()
    found(version)
    with pytest.raises(ConfigError, match=f"0.5.21, and was not tried on {version}: `pip install"):
        versions.check_disaggregation()

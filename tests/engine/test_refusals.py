# SPDX-License-Identifier: Apache-2.0
"""Bad input through ``launch.py``: one clear line and status 2, before any weight is loaded.

The many other cases are in tests/config; these go through the whole command.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fairkv_tests.engine_process import LAUNCH
from fairkv_tests.workloads import MODEL, write_plan


def _refused(model: Path, *arguments: str) -> str:
    """The one line with which ``launch.py`` ends."""
    done = subprocess.run(
        [
            sys.executable, str(LAUNCH), "--model-path", str(model), "--device", "cpu",
            "--dtype", "float32", "--fairkv", *arguments,
        ],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "Load weight" not in done.stderr
    (line,) = (row for row in done.stderr.splitlines() if row.startswith("error: "))
    return line


def test_plan_for_another_tp(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Both numbers, and the file."""
    plan = write_plan(tmp_path, 4, 1)
    line = _refused(tiny_model(**MODEL), "--tp", "2", "--fairkv-plan", plan)
    assert plan in line and "TP 4" in line and "TP 2" in line


def test_scope_head_without_profile(tiny_model: Callable[..., Path]) -> None:
    """What is missing, and what would do instead."""
    line = _refused(tiny_model(**MODEL), "--fairkv-scope", "head")
    assert "profile" in line and "uniform, layer or rank" in line


def test_unsupported_architecture(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """What is wrong, and which are served."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model(**MODEL), model)
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["GemmaForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))
    line = _refused(model)
    assert "this architecture" in line and "LlamaForCausalLM" in line

# SPDX-License-Identifier: Apache-2.0
"""Where a package is missing, each command says which in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fairkv_sglang.near_miss import missing_package

LAUNCH = Path(__file__).parents[2] / "launch.py"
WITHOUT = """
import importlib.metadata as metadata, sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {name!r}:
            raise ModuleNotFoundError("No module named {name}", name={name!r})

sys.meta_path.insert(0, Without())
version = metadata.version

def version_without(name):
    if name == {name!r}:
        raise metadata.PackageNotFoundError(name)
    return version(name)

metadata.version = version_without
"""
"""As ``sitecustomize``: the package is not there, whatever else imports it."""

CASES = [
    ("rich", ["check"]),
    ("torch", ["check"]),
    ("sglang", ["check"]),
    ("pydantic", ["check"]),
    ("rich", ["bench", "--help"]),
    ("pydantic", ["bench", "--help"]),
    ("torch", ["LAUNCH"]),
    ("rich", ["LAUNCH"]),
    ("sglang", ["LAUNCH"]),
    ("pydantic", ["LAUNCH"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "words"), CASES, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_one_line(package: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(name=package))
    launch = [str(LAUNCH), "--model-path", "nowhere", "--fairkv"]
    command = launch if words == ["LAUNCH"] else ["-m", "fairkv_sglang.cli.main", *words]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    name = {"sglang": "SGLang"}.get(package, package)
    assert f"{name} is not installed" in line


def test_the_package_behind_an_import_that_another_package_reports() -> None:
    """Transformers raises an error of its own, without a name."""
    root = ModuleNotFoundError("No module named 'rich'", name="rich")
    reported = ModuleNotFoundError("Could not import module 'PretrainedConfig'.")
    reported.__cause__ = root
    assert missing_package(reported) == "rich is not installed: pip install it"
    assert missing_package(ModuleNotFoundError("Odd.")) == "Odd."

# SPDX-License-Identifier: Apache-2.0
"""Benchmarks belong to a checkout: nothing of the product needs them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fairkv_sglang
from fairkv_sglang.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield f"{node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("folder", ["fairkv_sglang", "kernels", "patches"])
def test_nothing_that_is_installed_imports_a_benchmark(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    bench = "fairkv_sglang.bench"
    found = {str(f) for f in files for name in imported(f) if f"{name}.".startswith(f"{bench}.")}
    assert not found


def test_an_installation_says_in_one_line_where_the_benchmarks_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("fairkv_sglang.bench")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(fairkv_sglang, "__path__", [str(ROOT / "fairkv_sglang")])
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--tp", "2"])
    said = capsys.readouterr()
    assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert "pip install -e ." in said.err

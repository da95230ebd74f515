# SPDX-License-Identifier: Apache-2.0
"""Imports go one way: up CONTRIBUTING's table of folders, without a cycle, hidden ones included."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "fairkv_sglang"
FOLDERS = {
    ROOT / PACKAGE: PACKAGE,
    **{ROOT / n: f"{PACKAGE}.{n}" for n in ("kernels", "patches", "bench")},
}


@cache
def table() -> list[tuple[list[str], str]]:
    """CONTRIBUTING's rows, top to bottom: what stands in each, and which packages it may import."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Where things go")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", cells[0]), cells[2]) for cells in rows]


@cache
def modules() -> dict[str, Path]:
    """Every module of the package as it is in a checkout, by its name."""
    found = {}
    for folder, name in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = [name, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports: at its head, in functions and for type checks alike."""
    graph: dict[str, set[str]] = {}
    for module, file in modules().items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                up = node.level - (file.name == "__init__.py")
                base = module.split(".")[: -up or None] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                names |= {f"{source}.{alias.name}" for alias in node.names}
        graph[module] = names
    return graph


@cache
def arrows() -> dict[str, set[str]]:
    """Modules of the package that each module imports."""
    graph = {}
    for module, names in imports().items():
        graph[module] = {owner for name in names if (owner := _owner(name))} - {module}
    return graph


def _owner(name: str) -> str:
    """The module of the package that a dotted name is in; empty if it is in none."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name


def place(module: str) -> str:
    """Folder of a module, or its file if it stands in none, as the table has them."""
    if module == PACKAGE:
        return "__init__.py"
    first, *rest = module.removeprefix(f"{PACKAGE}.").split(".")
    return first if rest or modules()[module].name == "__init__.py" else f"{first}.py"


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle (what is left when ends are cut)."""
    left = {node: set(targets) for node, targets in graph.items()}
    while True:
        ends = {n for n in left if not left[n]} | (
            left.keys() - {target for targets in left.values() for target in targets}
        )
        if not ends:
            return [sorted(left)] if left else []
        left = {n: targets - ends for n, targets in left.items() if n not in ends}


def test_every_module_has_one_place_in_the_table() -> None:
    listed = [name for names, _ in table() for name in names]
    assert len(listed) == len(set(listed))
    assert {place(module) for module in modules()} == set(listed)


def test_no_import_goes_down_the_table() -> None:
    row = {name: number for number, (names, _) in enumerate(table()) for name in names}
    wrong = [
        f"{module} -> {target}"
        for module, targets in arrows().items()
        for target in sorted(targets)
        if row[place(module)] < row[place(target)]
    ]
    assert not wrong, wrong


def test_no_cycle() -> None:
    assert not cycles(arrows())
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_sglang_is_imported_where_the_table_says_so() -> None:
    allowed = {
        name
        for names, others in table()
        if "SGLang" in others or others.strip() == "all"
        for name in names
    }
    wrong = {
        module
        for module, names in imports().items()
        if place(module) not in allowed and any(n.split(".")[0] == "sglang" for n in names)
    }
    assert not wrong, wrong


def test_the_graph_by_folder() -> None:
    """Printed (``pytest -s``), one line per folder or file of the table."""
    graph: dict[str, Counter[str]] = {name: Counter() for names, _ in table() for name in names}
    for module, targets in arrows().items():
        graph[place(module)].update(place(t) for t in targets if place(t) != place(module))
    for name, targets in graph.items():
        size = sum(place(module) == name for module in modules())
        said = ", ".join(f"{target} {count}" for target, count in sorted(targets.items()))
        print(f"{name} ({size} modules) -> {said or 'nothing'}")
    assert graph["kernels"].keys() <= {"version.py"} and graph["cli"]

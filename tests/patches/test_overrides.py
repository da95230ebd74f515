# SPDX-License-Identifier: Apache-2.0
"""Overridden methods: each has a row, and one that SGLang would not call stops the start."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.mem_cache.prefill_budget import PrefillBudget
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from fairkv_sglang.engine import Engine
from fairkv_sglang.patches import all_overrides, cpu_overrides, ledger
from fairkv_sglang.patches.ledger import HookError
from fairkv_sglang.patches.overrides import Override, overrides

ROOT = Path(__file__).parents[2]
ROWS = (*all_overrides(), *cpu_overrides())


def classes_over_sglangs() -> list[type]:
    """Every class of ``patches/`` that is derived from one of SGLang's."""
    found = {Engine}
    for file in sorted((ROOT / "patches").glob("[!_]*.py")):
        module = importlib.import_module(f"fairkv_sglang.patches.{file.stem}")
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and any(base.__module__.startswith("sglang.") for base in value.__mro__):
                found.add(value)
    return sorted(found, key=lambda cls: cls.__name__)


def overridden(cls: type) -> set[str]:
    """Methods and properties of SGLang's that FairKV's part of the class hides."""
    mro = [base for base in cls.__mro__ if base is not object]
    theirs = [base for base in mro if not base.__module__.startswith("fairkv_sglang.")]
    return {
        name
        for base in mro
        if base not in theirs
        for name, value in vars(base).items()
        if not name.startswith("__") or name == "__call__"
        if inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)
        if any(name in vars(other) for other in theirs)
    }


@pytest.mark.parametrize("cls", classes_over_sglangs(), ids=lambda cls: cls.__name__)
def test_each_overridden_method_has_a_row(cls: type) -> None:
    rows = {row.method for row in ROWS if row.cls is cls and row.base is not None}
    assert rows == overridden(cls)


def test_all_rows_hold_for_this_sglang() -> None:
    assert len(ledger.verify(ROWS)) == len(ROWS) > 30
    assert all((ROOT / row.test).is_file() and row.why and row.since for row in ROWS)


WITH_A_CLASS = [row for row in ROWS if row.base]


@pytest.mark.parametrize("row", WITH_A_CLASS, ids=lambda row: f"{row.cls.__name__}.{row.method}")
def test_a_renamed_method_is_named(row: Override, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang calls it something else: FairKV's method would silently do nothing."""
    module, _, name = str(row.base).rpartition(".")
    base = getattr(importlib.import_module(module), name)
    for owner in base.__mro__:
        if row.method in vars(owner):
            method = vars(owner)[row.method]
            monkeypatch.delattr(owner, row.method)
            monkeypatch.setattr(owner, f"{row.method}_as_renamed", method, raising=False)
    with pytest.raises(HookError) as caught:
        ledger.verify([row])
    (line,) = str(caught.value).splitlines()
    assert f"override {row.base}.{row.method} has no method of that name" in line
    assert f"it is needed because: {row.why}" in line


def test_a_renamed_class_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules[PrefillBudget.__module__], "PrefillBudget")
    with pytest.raises(HookError, match=r"override .*PrefillBudget.* has no class in this SGLang"):
        ledger.verify(ROWS)


def test_another_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def reserve(self: Any, extend_input_len: int, output: int, *, extra_tokens: int = 0) -> None:
        """As a newer SGLang might have it."""

    monkeypatch.setattr(PrefillBudget, "reserve", reserve)
    with pytest.raises(HookError, match=r"called differently.*no parameter output"):
        ledger.verify(ROWS)


def test_a_property_that_became_a_method_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefillBudget, "remaining_total", lambda self: 0)
    with pytest.raises(HookError, match="one of them is a property"):
        ledger.verify(ROWS)


def test_the_process_checks_rows_that_are_asked_for_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_rows", [])
    monkeypatch.setattr(ledger, "_late", [])
    assert ledger.verify() == []
    ledger.need(all_overrides)
    ledger.need(all_overrides)
    assert ledger.verify() == [row.target for row in all_overrides()]
    for base in UnifiedRadixCache.__mro__:
        if "claim_kv_row" in vars(base):
            monkeypatch.delattr(base, "claim_kv_row")
    with pytest.raises(HookError, match=r"UnifiedRadixCache\.claim_kv_row"):
        ledger.verify()


# -- signatures and calls, on classes made for it ------------------------------------------------


class Theirs:
    def work(self, one: int, two: int = 2, *, three: int = 3) -> None: ...


def same(self: Any, one: int, two: int = 2, *, three: int = 3) -> None: ...
def wider(self: Any, one: int, *args: Any, **kwargs: Any) -> None: ...
def more(self: Any, one: int, two: int = 2, four: int = 4, *, three: int = 3) -> None: ...
def swapped(self: Any, two: int, one: int = 2, *, three: int = 3) -> None: ...
def demanding(self: Any, one: int, two: int, four: int, *, three: int = 3) -> None: ...
def narrow(self: Any, one: int, two: int = 2) -> None: ...
def by_name(self: Any, one: int, *, two: int = 2, three: int = 3) -> None: ...


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        (same, None),
        (wider, None),
        (more, None),
        (swapped, "another place"),
        (demanding, "no parameter four"),
        (narrow, "no parameter three"),
        (by_name, "takes two by name only"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_signatures(
    method: Callable[..., None], problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("theirs")
    module.Theirs = Theirs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "theirs", module)
    ours = type("Ours", (Theirs,), {"work": method})
    (row,) = overrides(ours, "theirs.Theirs", {"work": "x"}, since="0", test="t")
    if problem is None:
        row.check()
    else:
        with pytest.raises(HookError, match=problem):
            row.check()


@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("row = table._aux.free(row)", True),
        ("getattr(self, '_aux').free", False),
        ("table._aux.free_all(row)", False),
        ("table.other.free(row)", False),
        ("", False),
    ],
)
def test_calls(source: str, called: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object without a class: the name that SGLang's code has for it says who is called."""
    name = f"caller_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    ours = type("Ours", (), {"free": lambda self, row: None})
    rows = overrides(
        ours,
        None,
        {"free": "x"},
        callers=("no.such.module", name),
        since="0",
        test="t",
        receiver="_aux",
    )
    if called:
        ledger.verify(rows)
    else:
        with pytest.raises(HookError, match=r"interface .*free is not called any more in"):
            ledger.verify(rows)

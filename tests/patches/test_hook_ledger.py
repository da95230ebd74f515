# SPDX-License-Identifier: Apache-2.0
"""A hook counts as in effect only if what SGLang calls does reach it."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry

from fairkv_sglang.patches.ledger import Hook, HookError, in_effect, register, verify

MODULE = "fairkv_hook_target"


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module with a function and a class to hook, and an empty registry of SGLang."""
    module = types.ModuleType(MODULE)

    def work(x: int) -> int:
        return x + 1

    class Worker:
        def run(self, x: int) -> int:
            return x * 2

        @classmethod
        def make(cls, x: int) -> int:
            return x * 3

        @staticmethod
        def helper(x: int) -> int:
            return x * 5

    module.work, module.Worker = work, Worker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    yield module


def before(*args: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (*args[:-1], args[-1] + 100), {}


def after(result: int, *args: Any) -> int:
    return result + 1000


def around(original: Callable[..., int], *args: Any) -> int:
    return original(*args) + 10_000


def replaced(*args: Any) -> int:
    return -1


def hook(name: str, kind: Any, function: Callable[..., Any]) -> Hook:
    return Hook(
        target=f"{MODULE}.{name}",
        kind=kind,
        function=function,
        why="this test needs it",
        since="0.5.17",
        upstream="nowhere",
    )


HOOKS = (
    hook("work", "before", before),
    hook("work", "after", after),
    hook("work", "around", around),
    hook("Worker.run", "replace", replaced),
    hook("Worker.run", "after", after),
    hook("Worker.make", "around", around),
    hook("Worker.helper", "before", before),
)


def test_applied_hooks_are_in_effect(target: types.ModuleType) -> None:
    with pytest.raises(HookError, match=f"{MODULE}.work .before. did not take effect.*needs it"):
        verify(HOOKS)
    register(HOOKS)
    HookRegistry.apply_hooks()
    assert verify(HOOKS) == [entry.target for entry in HOOKS]
    assert target.work(1) == 101 + 1 + 1000 + 10_000
    assert target.Worker().run(1) == -1 + 1000
    assert target.Worker.make(1) == 3 + 10_000
    assert target.Worker.helper(1) == 505


@pytest.mark.parametrize(
    "name", ["nothing", "Worker.nothing", "Nothing.run", "work.deeper"], ids=str
)
def test_a_missing_target_is_named(target: types.ModuleType, name: str) -> None:
    missing = hook(name, "around", around)
    register([missing])
    HookRegistry.apply_hooks()  # SGLang only logs that it failed
    with pytest.raises(HookError, match=f"hook {MODULE}.{name} has no target.*needs it"):
        verify([missing])


def test_a_missing_module_is_named() -> None:
    missing = Hook("no_such_module.f", "after", after, "why not", "0.5.17", "nowhere")
    with pytest.raises(HookError, match=r"no_such_module\.f"):
        verify([missing])


@pytest.mark.parametrize("entry", HOOKS, ids=lambda entry: f"{entry.target[19:]}-{entry.kind}")
def test_each_hook_is_missed_when_it_is_lost(target: types.ModuleType, entry: Hook) -> None:
    others = [other for other in HOOKS if other is not entry]
    register(others)
    HookRegistry.apply_hooks()
    verify(others)
    with pytest.raises(HookError, match="did not take effect"):
        verify([entry])


def test_a_hook_that_another_plugin_replaces_is_missed(target: types.ModuleType) -> None:
    mine = hook("work", "replace", replaced)

    def theirs(*args: Any) -> int:
        return 0

    register([mine, hook("work", "replace", theirs)])
    HookRegistry.apply_hooks()
    assert target.work(1) == 0
    with pytest.raises(HookError, match="did not take effect"):
        verify([mine])


def test_wrappers_are_seen_through() -> None:
    def plain(x: int) -> int:
        return x

    @functools.wraps(plain)
    def wrapped(*args: Any) -> int:
        return plain(*args)

    class Holder:
        method = wrapped

    cached = functools.lru_cache(wrapped)
    looped: list[Any] = []

    def cycle() -> Any:
        return looped

    looped.append(cycle)
    for current in (plain, wrapped, Holder().method, cached, functools.partial(wrapped, 1)):
        assert in_effect(current, plain)
    for current in (cycle, print, None, 3, Holder):
        assert not in_effect(current, plain)

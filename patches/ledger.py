# SPDX-License-Identifier: Apache-2.0
"""The ledger: one row for every touch on SGLang, and the check that each of them took effect.

SGLang's own registry (``sglang.srt.plugins.hook_registry``) only *logs* a hook that fails to apply,
and in a child process that line is usually lost. So every process that serves calls :func:`verify`
and stops, naming the hook, when one is missing.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

HookKind = Literal["before", "after", "around", "replace"]


class HookError(RuntimeError):
    """A hook of the ledger did not take effect; the message names it."""


@dataclass(frozen=True)
class Hook:
    """One row of the ledger.

    Attributes:
        target: Dotted path of the SGLang function or method.
        kind: How :attr:`function` is applied (SGLang's ``HookType`` by value).
        function: The hook itself; its signature depends on ``kind`` (see SGLang's
            ``HookRegistry.register``).
        why: What breaks without it.
        since: First SGLang version with this target in this form, as far as known.
        upstream: Where the target stands in SGLang, or the upstream discussion.
        test: The test that proves that the hook took effect.
    """

    target: str
    kind: HookKind
    function: Callable[..., Any]
    why: str
    since: str
    upstream: str
    test: str = "tests/engine/test_hooks.py"


def register(hooks: Sequence[Hook]) -> None:
    """Register ``hooks`` with SGLang; ``load_plugins()`` applies them when the plugin returns."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        mark(hook.function)
        HookRegistry.register(hook.target, hook.function, HookType(hook.kind))


def mark(function: Callable[..., Any]) -> None:
    """Make ``function`` recognisable by :func:`in_effect` through any number of wrappers."""
    function.__dict__["__fairkv_hook__"] = True


def verify(hooks: Sequence[Hook]) -> list[str]:
    """Check that every hook is in the function that SGLang now calls.

    Returns:
        The targets, in ledger order.

    Raises:
        HookError: for the first hook that is missing, with its target and reason.
    """
    for hook in hooks:
        try:
            current = pkgutil.resolve_name(hook.target)
        except (ImportError, AttributeError) as error:
            raise HookError(
                f"FairKV cannot run: hook {hook.target} has no target in this SGLang ({error}); "
                f"it is needed because: {hook.why}"
            ) from error
        if not in_effect(current, hook.function):
            raise HookError(
                f"FairKV cannot run: hook {hook.target} ({hook.kind}) did not take effect; "
                f"it is needed because: {hook.why}"
            )
    return [hook.target for hook in hooks]


def in_effect(current: object, function: Callable[..., Any]) -> bool:
    """True if ``function`` is reachable from ``current`` through wrappers and their closures."""
    seen: set[int] = set()
    pending: list[object] = [current]
    while pending:
        item = pending.pop()
        if item is function:
            return True
        if id(item) in seen or not callable(item):
            continue
        seen.add(id(item))
        pending.append(getattr(item, "__func__", None))
        pending.append(getattr(item, "func", None))  # functools.partial
        closure = getattr(item, "__closure__", None) or ()
        if not closure:
            # A wrapper written in Python holds in its closure what it calls; `__wrapped__` may
            # name a function that it replaced and never calls.
            pending.append(getattr(item, "__wrapped__", None))
        for cell in closure:
            try:
                content = cell.cell_contents
            except ValueError:  # a cell that is still empty
                continue
            pending.extend(content if isinstance(content, list | tuple) else [content])
    return False

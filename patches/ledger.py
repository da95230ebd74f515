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
from typing import Any, Literal, Protocol

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

    def check(self) -> None:
        """Raise HookError, with target and reason, if SGLang does not call the hook."""
        try:
            current = pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError) as error:
            raise HookError(
                f"FairKV cannot run: hook {self.target} has no target in this SGLang ({error}); "
                f"it is needed because: {self.why}"
            ) from error
        if not in_effect(current, self.function):
            raise HookError(
                f"FairKV cannot run: hook {self.target} ({self.kind}) did not take effect; "
                f"it is needed because: {self.why}"
            )


class Row(Protocol):
    """What hooks and overridden methods (``overrides.py``) have in common; see :class:`Hook`."""

    @property
    def target(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def why(self) -> str: ...
    @property
    def since(self) -> str: ...
    @property
    def upstream(self) -> str: ...
    @property
    def test(self) -> str: ...
    def check(self) -> None: ...


_rows: list[Row] = []
_late: list[Callable[[], Sequence[Row]]] = []


def need(rows: Callable[[], Sequence[Row]]) -> None:
    """Let :func:`verify` check the rows in this process, which are asked for then only."""
    if rows not in _late:
        _late.append(rows)


def register(hooks: Sequence[Hook]) -> None:
    """Register ``hooks`` with SGLang; ``load_plugins()`` applies them when the plugin returns."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _rows.extend(hook for hook in hooks if hook not in _rows)
    for hook in hooks:
        mark(hook.function)
        HookRegistry.register(hook.target, hook.function, HookType(hook.kind))


def mark(function: Callable[..., Any]) -> None:
    """Make ``function`` recognisable by :func:`in_effect` through any number of wrappers."""
    function.__dict__["__fairkv_hook__"] = True


def verify(rows: Sequence[Row] | None = None) -> list[str]:
    """Check that every row is in effect.

    Args:
        rows: Rows to check; None: all that this process needs.

    Returns:
        The targets, in order.

    Raises:
        HookError: for the first that is not, with its target and reason.
    """
    if rows is None:
        rows = [*_rows, *(row for late in _late for row in late())]
    for row in rows:
        row.check()
    return [row.target for row in rows]


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

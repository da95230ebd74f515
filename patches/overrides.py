# SPDX-License-Identifier: Apache-2.0
"""Rows of the ledger for methods of SGLang's classes that FairKV's subclasses override.

Python takes a method that SGLang has renamed for a new one that nobody calls. So a rank checks
before it serves that SGLang's class still has the method, that SGLang could call FairKV's in the
same way, and that SGLang's code still names it where it is called from.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fairkv_sglang.patches.ledger import HookError

Parameter = inspect.Parameter


@dataclass(frozen=True)
class Override:
    """One row of the ledger.

    Attributes:
        cls: FairKV's class.
        base: Dotted path of SGLang's class; None for an object that SGLang takes for what it can
            do, without a class of its own for it.
        method: Name of the method or property.
        why: What breaks without it.
        callers: Modules of SGLang of which at least one names the method; empty where SGLang
            calls it by way of its own class alone.
        since: First SGLang version with this method in this form, as far as known.
        test: The test that proves that SGLang calls it.
        receiver: Name that SGLang's code has for the object, if that is always the same.
    """

    cls: type
    base: str | None
    method: str
    why: str
    callers: tuple[str, ...]
    since: str
    test: str
    receiver: str = ""

    @property
    def kind(self) -> str:
        """``override``, or ``interface`` for an object without a class of SGLang's."""
        return "override" if self.base else "interface"

    @property
    def target(self) -> str:
        """SGLang's method, or where an object without a class is called."""
        return f"{self.base or f'{self.callers[0]}.{self.receiver}'}.{self.method}"

    @property
    def upstream(self) -> str:
        """Where SGLang calls the method, or defines it."""
        paths = self.callers or (str(self.base).rpartition(".")[0],)
        return ", ".join(path.replace(".", "/") + ".py" for path in paths)

    def check(self) -> None:
        """Raise HookError, naming the method, if SGLang would not call it as FairKV has it."""
        problem = self._problem()
        if problem is not None:
            raise HookError(
                f"FairKV cannot run: {self.kind} {self.target} {problem}; it is needed because: "
                f"{self.why}"
            )

    def _problem(self) -> str | None:
        ours = inspect.getattr_static(self.cls, self.method, None)
        if ours is None:
            return f"is missing in {self.cls.__name__}"
        if self.base is not None:
            try:
                base = pkgutil.resolve_name(self.base)
            except (ImportError, AttributeError) as error:
                return f"has no class in this SGLang ({error})"
            # not getattr_static, which goes on to the class of the class
            theirs = next(
                (vars(c)[self.method] for c in base.__mro__ if self.method in vars(c)), None
            )
            if theirs is None:
                return "has no method of that name in this SGLang"
            if not issubclass(self.cls, base):
                return f"is not inherited by {self.cls.__name__}"
            difference = _difference(ours, theirs)
            if difference is not None:
                return f"is called differently in this SGLang ({difference})"
        if self.callers and not any(
            _names(module, self.receiver, self.method) for module in self.callers
        ):
            return f"is not called any more in {' or '.join(self.callers)}"
        return None


def overrides(
    cls: type,
    base: str | None,
    reasons: Mapping[str, str],
    *,
    callers: tuple[str, ...] = (),
    since: str,
    test: str,
    receiver: str = "",
) -> tuple[Override, ...]:
    """Rows of one class.

    Args:
        cls, base, callers, since, test, receiver: As :class:`Override` has them.
        reasons: Name of each method -> why it is overridden.
    """
    return tuple(
        Override(cls, base, method, why, callers, since, test, receiver)
        for method, why in reasons.items()
    )


def _difference(ours: object, theirs: object) -> str | None:
    """How a call that suits SGLang's method would miss FairKV's; None if it does not."""
    if isinstance(ours, property) or isinstance(theirs, property):
        same = isinstance(ours, property) and isinstance(theirs, property)
        return None if same else "one of them is a property"
    mine, wanted = _parameters(ours), _parameters(theirs)
    takes = {parameter.kind for parameter in mine.values()}
    for name, parameter in wanted.items():
        if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            if parameter.kind not in takes:
                return f"FairKV's has no {'*' * (1 + (parameter.kind == 4))}{name}"
            continue
        found = mine.get(name)
        if found is None:
            absorbed = Parameter.VAR_KEYWORD in takes or (
                Parameter.VAR_POSITIONAL in takes and parameter.kind != Parameter.KEYWORD_ONLY
            )
            if not absorbed:
                return f"FairKV's has no parameter {name}"
        elif parameter.kind != Parameter.KEYWORD_ONLY and found.kind != Parameter.KEYWORD_ONLY:
            if list(mine).index(name) != list(wanted).index(name):
                return f"parameter {name} has another place"
        elif parameter.kind != found.kind and found.kind == Parameter.KEYWORD_ONLY:
            return f"FairKV's takes {name} by name only"
    for name, parameter in mine.items():
        named = parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        if named and parameter.default is Parameter.empty and name not in wanted:
            return f"SGLang's has no parameter {name}"
    return None


def _parameters(method: object) -> Mapping[str, inspect.Parameter]:
    function = getattr(method, "__func__", method)
    return inspect.signature(function).parameters  # type: ignore[arg-type]


@cache
def _names(module: str, receiver: str, method: str) -> bool:
    """Whether the module's source names the method; True where there is no source to look at."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        spec = None
    if spec is None:
        return False
    path = Path(spec.origin or "")
    if path.suffix != ".py" or not path.is_file():
        return True
    call = re.compile(rf"{receiver}[.\"']{re.escape(method)}\b")
    return call.search(path.read_text(encoding="utf-8")) is not None

# SPDX-License-Identifier: Apache-2.0
"""A table of named classes that fills itself from the modules of one folder."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any, TypeVar

T = TypeVar("T")


class Registry(dict[str, type[T]]):
    """name -> class. A new method is one new file whose class is decorated by ``register``."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator; the class attribute ``name`` is the key."""
        name: str = cls.name  # type: ignore[attr-defined]
        if self.setdefault(name, cls) is not cls:
            raise ValueError(f"two {self._what}s are called {name!r}")
        return cls

    def __missing__(self, name: str) -> type[T]:
        raise ValueError(f"unknown {self._what} {name!r}; known: {', '.join(self)}")

    def make(self, name: str, *args: Any, **options: Any) -> T:
        """An instance; ValueError that lists the valid names or options if one is not known."""
        cls = self[name]
        known = list(inspect.signature(cls).parameters)
        unknown = [option for option in options if option not in known]
        if unknown:
            raise ValueError(
                f"{self._what} {name!r} has no option {', '.join(unknown)}; "
                f"it has: {', '.join(known) or 'none'}"
            )
        return cls(*args, **options)


def import_all(package: str, path: list[str]) -> None:
    """Imports every module of a package, in name order, so that its classes register."""
    for module in sorted(info.name for info in pkgutil.iter_modules(path)):
        importlib.import_module(f"{package}.{module}")

# SPDX-License-Identifier: Apache-2.0
"""Registries of methods (scorers, budget scopes, placement policies): one file is one method.

A method is a dataclass with a ``name`` and a one-line ``summary``. Those of its fields that are
made by :func:`option` are the options that users can set; flags, configuration keys, help, messages
and the tables of ``docs/`` are made from them. Other packages add methods through entry points.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from fairkv_sglang.near_miss import did_you_mean

T = TypeVar("T")
_HELP = "help"
_KNOWN: dict[str, tuple[Any, str]] = {}  # option -> its type and the first method that has it


class Options(BaseModel):
    """Base of everything that a user sets: frozen, and a number is not a switch."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_bool(cls, value: Any, info: Any) -> Any:
        # pydantic reads true as 1; in a file that is a mistake
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise PydanticCustomError("bool", "a switch value is not accepted here")
        return value


def option(default: Any, help: str, **bounds: Any) -> Any:
    """A dataclass field that is an option of the method.

    Args:
        default: Used when the user gives nothing.
        help: One sentence or two; the same for every method that has this option.
        **bounds: ``gt``, ``ge``, ``lt``, ``le``, as for :func:`pydantic.Field`.
    """
    return dataclasses.field(default=default, metadata={_HELP: help, "bounds": bounds})


class Registry(Mapping[str, type[T]]):
    """Methods by name. Those of this package register when they are imported, those of other
    packages are loaded when the registry is first asked.

    Args:
        what: What a method is, for messages.
        group: Entry point group of other packages; the entry's name is the method's.
        known: Options by name, shared by all registries: a name means one thing.
    """

    def __init__(
        self, what: str, group: str, known: dict[str, tuple[Any, str]] | None = None
    ) -> None:
        self.what, self.group = what, group
        self._known = _KNOWN if known is None else known
        self._classes: dict[str, type[T]] = {}
        self._models: dict[str, type[Options]] = {}
        self._broken: dict[str, str] | None = None  # None: other packages were not looked at yet

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator, above ``@dataclass``; the class attribute ``name`` is the key.

        Raises:
            ValueError: name taken, class incomplete, or an option that another method has with
                another type.
        """
        name, summary = getattr(cls, "name", None), getattr(cls, "summary", None)
        if not isinstance(name, str) or not summary or not dataclasses.is_dataclass(cls):
            raise ValueError(
                f"{self.what} {cls.__qualname__} must be a dataclass with a name and a summary"
            )
        if self._classes.get(name, cls) is not cls:
            raise ValueError(f"two {self.what}s are called {name!r}")
        model = _options_model(cls)
        owner = f"{self.what} {name!r}"
        for key, field in model.model_fields.items():
            kind, first = self._known.get(key, (field.annotation, owner))
            if kind != field.annotation:
                raise ValueError(f"{owner}: its option {key!r} is of another type in {first}")
        for key, field in model.model_fields.items():
            self._known.setdefault(key, (field.annotation, owner))
        self._classes[name], self._models[name] = cls, model
        return cls

    def options(self, name: str) -> dict[str, FieldInfo]:
        """Options of a method, with type, default, bounds and description."""
        self[name]
        return self._models[name].model_fields

    def having(self, option: str) -> list[str]:
        """Methods that have an option."""
        return [name for name in self if option in self._models[name].model_fields]

    def make(self, name: str, *args: Any, **options: Any) -> T:
        """A method with ``options``; ``args`` are its fields that are none.

        Raises:
            ValueError: in one line: unknown name, unknown option, wrong value.
        """
        cls = self[name]
        known = self.options(name)
        unknown = [key for key in options if key not in known]
        if unknown:
            raise ValueError(
                f"{self.what} {name!r} has no option {', '.join(unknown)}; "
                f"it has: {', '.join(known) or 'none'}"
            )
        try:
            values = dict(self._models[name].model_validate(options))
        except ValidationError as error:
            lines = "; ".join(explain(detail) for detail in error.errors())
            raise ValueError(f"{self.what} {name!r}: {lines}") from None
        return cls(*args, **values)

    def broken(self) -> Mapping[str, str]:
        """Methods of other packages that cannot be used, each with a line that says why."""
        if self._broken is None:
            self._broken = {}
            for entry in sorted(entry_points(group=self.group), key=lambda entry: entry.name):
                self._load(entry, self._broken)
        return self._broken

    def _load(self, entry: EntryPoint, broken: dict[str, str]) -> None:
        try:
            cls = entry.load()
            if getattr(cls, "name", None) != entry.name:
                raise ValueError(f"its name is not {entry.name!r} but {cls.name!r}")
            self.register(cls)
        except Exception as error:  # whatever the code of another package raises
            package = entry.dist.name if entry.dist is not None else "an unknown package"
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            broken[entry.name] = (
                f"{self.what} {entry.name!r} of {package} cannot be used ({entry.value}): {reason}"
            )

    def __getitem__(self, name: str) -> type[T]:
        broken = self.broken()
        if name in self._classes:
            return self._classes[name]
        raise ValueError(
            broken.get(name) or f"unknown {self.what} {name!r}; known: {', '.join(self)}"
        )

    def __contains__(self, name: object) -> bool:
        self.broken()
        return isinstance(name, str) and name in self._classes

    def __iter__(self) -> Iterator[str]:
        self.broken()
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        self.broken()
        return len(self._classes)


def reserve(names: Iterable[str]) -> None:
    """Names that no option of a method may have."""
    for name in names:
        if name in _KNOWN:
            raise ValueError(f"{_KNOWN[name][1]}: its option {name!r} is one of FairKV itself")
        _KNOWN[name] = (None, "FairKV itself")  # no option's type


def import_all(package: str, path: list[str]) -> None:
    """Imports every module of a package, in name order, so that its classes register."""
    for module in sorted(info.name for info in pkgutil.iter_modules(path)):
        importlib.import_module(f"{package}.{module}")


def _options_model(cls: type[Any]) -> type[Options]:
    hints = typing.get_type_hints(cls, include_extras=True)
    fields: dict[str, Any] = {
        field.name: (
            hints[field.name],
            Field(field.default, description=field.metadata[_HELP], **field.metadata["bounds"]),
        )
        for field in dataclasses.fields(cls)
        if _HELP in field.metadata
    }
    model: type[Options] = create_model(f"{cls.__name__}Options", __base__=Options, **fields)
    return model


def not_one_of(value: Any, choices: Iterable[str]) -> str:
    """Says that a name is wrong, which are right and which was perhaps meant."""
    choices = list(choices)
    return f"{value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}"


def explain(details: ErrorDetails, shown: str | None = None) -> str:
    """One pydantic error in words.

    Args:
        details: The error.
        shown: What the user called the option, if not by its name.
    """
    if shown is None:
        shown = ".".join(map(str, details["loc"]))
    value = details["input"]
    if isinstance(value, Path):
        value = str(value)
    kind, context = details["type"], details.get("ctx", {})
    bounds = {
        "greater_than": ("greater than", "gt"),
        "greater_than_equal": ("at least", "ge"),
        "less_than": ("less than", "lt"),
        "less_than_equal": ("at most", "le"),
    }
    if kind == "literal_error":
        text = not_one_of(value, re.findall(r"'([^']*)'", context["expected"]))
    elif kind in ("int_parsing", "int_type", "int_from_float"):
        text = f"{value!r} is not a whole number"
    elif kind in ("float_parsing", "float_type", "finite_number"):
        text = f"{value!r} is not a number"
    elif kind == "extra_forbidden":
        text = "there is no such option"
    elif kind in bounds:
        words, key = bounds[kind]
        text = f"{value} must be {words} {context[key]}"
    else:
        text = details["msg"]
    return f"{shown}: {text}" if shown else text

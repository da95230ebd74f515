# SPDX-License-Identifier: Apache-2.0
"""Where a configuration comes from: flags, a file, the environment or a dictionary.

Values are looked up in this order: flags, then the file of ``--fairkv-config``, then the file of
the environment variable ``FAIRKV_CONFIG``, then the defaults. The parent process validates once and
hands the result to its child processes as one variable, ``FAIRKV_RESOLVED``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fairkv_sglang.config.model import (
    FairKVConfig,
    fields,
    files,
    known,
    registries,
    settled,
    unknown,
)
from fairkv_sglang.registry import explain

logger = logging.getLogger(__name__)

FILE_VARIABLE = "FAIRKV_CONFIG"
"""Environment variable of the user: a configuration file, which turns FairKV on."""
RESOLVED_VARIABLE = "FAIRKV_RESOLVED"
"""Environment variable from parent to children: the validated configuration as JSON."""
FLAG = "--fairkv"
"""The switch; every other flag is this, a dash and the field's name with dashes."""
_EXCLUSIVE = ("budget", "ratio")
_OF_RATIO = ("budget_least", "budget_most")


class ConfigError(ValueError):
    """The user's input is wrong; the message is one line that says what is wrong and what would be
    right.
    """


def from_mapping(values: Mapping[str, Any], origin: str = "") -> FairKVConfig:
    """Validate ``values``.

    Args:
        values: Fields by name.
        origin: Where they come from, for messages: ``"flags"``, a file name or nothing.

    Raises:
        ConfigError: with one line for everything that is wrong.
    """
    _check_known(values, origin)
    try:
        config = FairKVConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = [_line(details, origin) for details in error.errors()]
        raise ConfigError(_prefix(origin) + "; ".join(lines)) from None
    if config.enabled and origin != RESOLVED_VARIABLE:
        for methods in registries().values():
            for line in methods.broken().values():
                logger.warning("FairKV: %s", line)
    return config


def read_file(path: str | Path) -> dict[str, Any]:
    """Fields from a YAML or JSON file; paths in it are relative to the file.

    Raises:
        ConfigError: when the file is missing, unreadable or not a mapping of known keys.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"FairKV configuration {path}: {error.strerror or error}") from None
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"FairKV configuration {path} cannot be read: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"FairKV configuration {path} must map option names to values")
    _check_known(values, str(path))
    for key in files():
        if isinstance(values.get(key), str):
            values[key] = path.parent / values[key]
    return values


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--fairkv`` and one flag per field, in a group of their own; absent flags leave no
    trace.

    Values are strings here: :class:`FairKVConfig` parses and checks them, so that a flag and a key
    of a file get the same treatment and the same message.
    """
    group = parser.add_argument_group(
        "FairKV",
        "KV-cache budgets per head, with heads placed on ranks by load (plugin fairkv-sglang)",
    )
    group.add_argument(
        f"{FLAG}-config",
        dest="fairkv_config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML or JSON file with these options, names without --fairkv- (flags win over it).",
    )
    for name, field, text in fields():
        names = [_flag(name)]
        if name.startswith("debug."):
            names.append(_flag(name.removeprefix("debug.")))  # the short name works too
        how: dict[str, Any] = {"dest": _dest(name), "default": argparse.SUPPRESS}
        if field.annotation is bool and field.default is False:
            how["action"] = "store_true"
        else:
            how["metavar"] = metavar(name, field)
            if field.default is not None:
                text += f" (default: {field.default})"
        group.add_argument(*names, help=text.replace("%", "%%"), **how)


def from_flags(
    arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ
) -> FairKVConfig:
    """Configuration of a command line parsed with :func:`add_flags`.

    Raises:
        ConfigError: for wrong values, and for options of FairKV on a command line that does not
            turn it on.
    """
    flags: dict[str, Any] = {}
    for name, _, _ in fields():
        if hasattr(arguments, _dest(name)):
            flags[name.removeprefix("debug.")] = getattr(arguments, _dest(name))
    file = getattr(arguments, "fairkv_config", None)
    layers: list[Mapping[str, Any]] = []
    if environment.get(FILE_VARIABLE):
        layers.append({"enabled": True, **read_file(environment[FILE_VARIABLE])})
    if file is not None:
        layers.append(read_file(file))
    layers.append(flags)
    config = from_mapping(merge(layers), "flags" if flags else str(file or ""))
    if not config.enabled and (flags or file is not None):
        given = _flag(next(iter(flags))) if flags else f"{FLAG}-config"
        raise ConfigError(
            f"{given} is given but FairKV is off: add {FLAG} (or `enabled: true` to the "
            "configuration file)"
        )
    return config


def merge(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join layers of fields; later ones win.

    A budget replaces an earlier ratio with its bounds, and the other way round; another method than
    the earlier one's takes the place of its options, too.
    """
    merged: dict[str, Any] = {}
    for layer in map(settled, layers):
        given = {key: value for key, value in layer.items() if value is not None}
        if any(key in given for key in _EXCLUSIVE):
            bounds = _OF_RATIO if "budget" in given else ()
            for key in (*_EXCLUSIVE, *bounds):
                merged.pop(key, None)
        for key in registries():
            if given.get(key, merged.get(key)) != merged.get(key):
                _drop_options(merged, key, given[key])
        before, debug = merged.get("debug"), given.get("debug")
        if isinstance(before, Mapping) and isinstance(debug, Mapping):
            given["debug"] = {**before, **debug}
        merged |= given
    return merged


def _drop_options(merged: dict[str, Any], field: str, chosen: Any) -> None:
    """Takes out options that were given for another method than a later layer chooses."""
    methods = registries()[field]
    kept = methods.options(chosen) if chosen in methods else {}
    for method in methods:
        for option in methods.options(method):
            if option not in kept:
                merged.pop(option, None)


def from_environment(environment: Mapping[str, str] = os.environ) -> FairKVConfig | None:
    """Configuration that the environment asks for: the parent's, else the user's file; None if
    neither is set.

    Raises:
        ConfigError: when the file of ``FAIRKV_CONFIG`` is wrong.
    """
    if environment.get(RESOLVED_VARIABLE):
        return from_mapping(json.loads(environment[RESOLVED_VARIABLE]), RESOLVED_VARIABLE)
    file = environment.get(FILE_VARIABLE)
    if not file:
        return None
    return from_mapping({"enabled": True, **read_file(file)}, file)


def _flag(name: str) -> str:
    return FLAG if name == "enabled" else f"{FLAG}-{name.replace('.', '-').replace('_', '-')}"


def _dest(name: str) -> str:
    return f"fairkv_{name.replace('.', '_')}"


def metavar(name: str, field: FieldInfo) -> str:
    """How a value is written: the names that it can be, or a letter for its kind."""
    if name in registries():
        return "{" + ",".join(registries()[name]) + "}"
    annotation: Any = field.annotation
    union = isinstance(annotation, types.UnionType)
    kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
    kind = kinds[0] if union else annotation
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    return {int: "N", float: "X", Path: "FILE", bool: "{true,false}"}.get(kind, name.upper())


def _line(details: ErrorDetails, origin: str) -> str:
    """One pydantic error in words."""
    if not details["loc"]:
        return details["msg"]
    name = ".".join(map(str, details["loc"]))
    return explain(details, _flag(name) if origin == "flags" else name)


def _prefix(origin: str) -> str:
    return f"FairKV configuration {origin}: " if origin and origin != "flags" else ""


def _check_known(values: Mapping[str, Any], origin: str) -> None:
    for key in values:
        if key not in known():
            raise ConfigError(_prefix(origin) + unknown(str(key)))

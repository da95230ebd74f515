# SPDX-License-Identifier: Apache-2.0
"""One object for everything FairKV can be told: from flags, a file, the environment or a
dictionary.

Values are looked up in this order: flags, then the file of ``--fairkv-config``, then the file of
the environment variable ``FAIRKV_CONFIG``, then the defaults below. The parent process validates
once and hands the result to its child processes as one variable, ``FAIRKV_RESOLVED``.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

FILE_VARIABLE = "FAIRKV_CONFIG"
"""Environment variable of the user: a configuration file, which turns FairKV on."""
RESOLVED_VARIABLE = "FAIRKV_RESOLVED"
"""Environment variable from parent to children: the validated configuration as JSON."""
FLAG = "--fairkv"
"""The switch; every other flag is this, a dash and the field's name with dashes."""
DEFAULT_RATIO = 0.25
"""Share of a prompt that is kept when neither a budget nor a ratio is given."""

_EXCLUSIVE = ("budget", "ratio")


class ConfigError(ValueError):
    """The user's input is wrong; the message is one line that says what is wrong and what would be
    right.
    """


class FairKVConfig(BaseModel):
    """All options of FairKV. Every field is a flag, a key of the file and a key of
    ``Engine(fairkv={...})``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    enabled: bool = Field(False, description="Turn FairKV on.")
    budget: int | None = Field(
        None, gt=0, description="Tokens of a prompt that a head keeps, on average over all heads."
    )
    ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="The budget as a share of the prompt, instead of --fairkv-budget "
        f"(default: {DEFAULT_RATIO} when neither is given).",
    )
    scorer: Literal["snapkv", "streaming"] = Field(
        "snapkv",
        description="What a token is worth: snapkv = attention from the last tokens of the prompt; "
        "streaming = the first and the most recent tokens.",
    )
    window: int = Field(
        32,
        gt=0,
        description="Last tokens of the prompt: always kept; snapkv scores with their queries.",
    )
    kernel_size: int = Field(
        7, gt=0, description="snapkv: width of the pooling over neighbouring tokens (odd)."
    )
    pooling: Literal["max", "avg"] = Field("max", description="snapkv: kind of the pooling.")
    sink: int = Field(4, ge=0, description="streaming: first tokens of the prompt, always kept.")
    scope: Literal["uniform", "head", "layer", "rank"] = Field(
        "layer",
        description="Over what a budget is shared: uniform = every head the same; head = fixed "
        "shares from the profile; layer = the best tokens of all heads of a layer; "
        "rank = of the heads of one rank.",
    )
    floor_alpha: float = Field(
        0.2, ge=0, le=1, description="Share of the mean budget that every head keeps in any case."
    )
    profile: Path | None = Field(
        None, description="Head profile: expected budget share of each head. Scope head needs one."
    )
    placement: Literal["contiguous", "best_effort", "fair_copying", "equal_shares", "exact"] = (
        Field(
            "fair_copying",
            description="Policy that gives heads, and shares of copied heads, to ranks.",
        )
    )
    max_copies: int | None = Field(
        None,
        ge=0,
        description="Most copies of heads in a layer (default: as many as pay for themselves).",
    )
    plan: Path | None = Field(
        None, description="A placement plan to use as it is, instead of making one at start."
    )
    replan: Literal["on", "advise", "off"] = Field(
        "on",
        description="Plan anew from the traffic while serving; advise = say so in the log only.",
    )
    replan_window: int = Field(
        64, gt=0, description="Latest prompts from whose kept tokens a new plan is made."
    )
    spare_lanes: int | None = Field(
        None,
        ge=0,
        description="Lanes beyond its home heads that a rank has room for in each layer, so that "
        "a new plan needs no restart (default: what the cost model justifies).",
    )
    expected_batch: int = Field(
        32, gt=0, description="Requests decoded together, for making the plan."
    )
    expected_prompt: int = Field(
        4096, gt=0, description="Prompt length in tokens, for making the plan."
    )
    prefill_pool: int | None = Field(
        None, gt=0, description="Tokens of the pool for prompts in prefill and cached prefixes."
    )
    max_head_tokens: int | None = Field(
        None,
        gt=0,
        description="Longest kept prompt plus output of one head in tokens; sizes the page tables.",
    )
    decode_backend: Literal["auto", "numba", "torch", "flashinfer", "triton"] = Field(
        "auto", description="Decode attention; auto = flashinfer on CUDA, numba on CPU."
    )
    arena_pages: int | None = Field(
        None,
        gt=0,
        description="Head pages of a rank, instead of what the memory allows (for tests).",
    )
    log_decisions: bool = Field(
        False, description="Log every admission, retraction and owner on every rank."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_bool(cls, value: Any, info: Any) -> Any:
        # pydantic reads true as 1; in a file that is a mistake
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise PydanticCustomError("bool", "a switch value is not accepted here")
        return value

    @field_validator("profile", "plan")
    @classmethod
    def _exists(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        if not value.exists():  # a profile may be a folder
            raise PydanticCustomError("file", "there is no file {path}", {"path": repr(str(value))})
        return value.resolve()

    @model_validator(mode="after")
    def _fits_together(self) -> FairKVConfig:
        if self.budget is not None and self.ratio is not None:
            raise PydanticCustomError(
                "exclusive",
                "budget and ratio exclude each other: give the tokens or the share, not both",
            )
        if self.kernel_size % 2 == 0:
            raise PydanticCustomError(
                "odd",
                "kernel_size: {value} is even; pooling is centred on a token, so give an odd "
                "number, e.g. {right}",
                {"value": self.kernel_size, "right": self.kernel_size + 1},
            )
        # A budget has room for one token that was chosen, or for the sinks.
        least = max(self.always_kept, self.window + 1)
        if self.budget is not None and self.budget < least:
            raise PydanticCustomError(
                "budget",
                "budget: {budget} tokens are too few for scorer {scorer} ({parts}); "
                "give at least {least}",
                {
                    "budget": self.budget,
                    "least": least,
                    "scorer": self.scorer,
                    "parts": f"window {self.window}"
                    + (f" + sink {self.sink}" if self.scorer == "streaming" else ""),
                },
            )
        if self.scope == "head" and self.profile is None:
            raise PydanticCustomError(
                "profile",
                "scope head takes the share of each head from a profile: give profile a file, or "
                "choose scope uniform, layer or rank",
            )
        return self

    @property
    def always_kept(self) -> int:
        """Tokens of a prompt that every head keeps, whatever their score."""
        return self.window + (self.sink if self.scorer == "streaming" else 0)

    @property
    def effective_ratio(self) -> float | None:
        """The share of a prompt to keep, default applied; None when the budget is a number of
        tokens.
        """
        if self.budget is not None:
            return None
        return DEFAULT_RATIO if self.ratio is None else self.ratio

    def to_json(self) -> str:
        """The value of ``FAIRKV_RESOLVED``."""
        return self.model_dump_json()


def from_mapping(values: Mapping[str, Any], origin: str = "") -> FairKVConfig:
    """Validate ``values``.

    Args:
        values: Fields by name.
        origin: Where they come from, for messages: ``"flags"``, a file name or nothing.

    Raises:
        ConfigError: with one line for everything that is wrong.
    """
    unknown = [key for key in values if key not in FairKVConfig.model_fields]
    if unknown:
        raise ConfigError(_prefix(origin) + _unknown(str(unknown[0])))
    try:
        return FairKVConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = [_line(details, origin) for details in error.errors()]
        raise ConfigError(_prefix(origin) + "; ".join(lines)) from None


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
    for key in values:
        if key not in FairKVConfig.model_fields:
            raise ConfigError(_prefix(str(path)) + _unknown(str(key)))
    for key in ("profile", "plan"):
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
    for name, field in FairKVConfig.model_fields.items():
        flag = FLAG if name == "enabled" else f"{FLAG}-{name.replace('_', '-')}"
        dest = f"fairkv_{name}"
        text = (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            group.add_argument(
                flag, dest=dest, action="store_true", default=argparse.SUPPRESS, help=text
            )
            continue
        if field.default is not None:
            text += f" (default: {field.default})"
        group.add_argument(
            flag, dest=dest, metavar=_metavar(name), default=argparse.SUPPRESS, help=text
        )


def from_flags(
    arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ
) -> FairKVConfig:
    """Configuration of a command line parsed with :func:`add_flags`.

    Raises:
        ConfigError: for wrong values, and for options of FairKV on a command line that does not
            turn it on.
    """
    flags = {
        name: getattr(arguments, f"fairkv_{name}")
        for name in FairKVConfig.model_fields
        if hasattr(arguments, f"fairkv_{name}")
    }
    file = getattr(arguments, "fairkv_config", None)
    layers: list[Mapping[str, Any]] = []
    if environment.get(FILE_VARIABLE):
        layers.append({"enabled": True, **read_file(environment[FILE_VARIABLE])})
    if file is not None:
        layers.append(read_file(file))
    layers.append(flags)
    config = from_mapping(merge(layers), "flags" if flags else str(file or ""))
    if not config.enabled and (flags or file is not None):
        given = f"{FLAG}-{next(iter(flags)).replace('_', '-')}" if flags else f"{FLAG}-config"
        raise ConfigError(
            f"{given} is given but FairKV is off: add {FLAG} (or `enabled: true` to the "
            "configuration file)"
        )
    return config


def merge(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join layers of fields; later ones win, and a budget replaces an earlier ratio and the other
    way round.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        given = {key: value for key, value in layer.items() if value is not None}
        if any(key in given for key in _EXCLUSIVE):
            for key in _EXCLUSIVE:
                merged.pop(key, None)
        merged.update(given)
    return merged


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


def _metavar(name: str) -> str:
    annotation: Any = FairKVConfig.model_fields[name].annotation
    options = [
        option
        for option in (
            typing.get_args(annotation) if isinstance(annotation, types.UnionType) else [annotation]
        )
        if option is not type(None)
    ]
    if typing.get_origin(options[0]) is Literal:
        return "{" + ",".join(typing.get_args(options[0])) + "}"
    return {int: "N", float: "X", Path: "FILE"}.get(options[0], name.upper())


def _line(details: ErrorDetails, origin: str) -> str:
    """One pydantic error in words."""
    if not details["loc"]:
        return details["msg"]
    name = str(details["loc"][0])
    shown = name
    if origin == "flags":
        shown = FLAG if name == "enabled" else f"{FLAG}-{name.replace('_', '-')}"
    value = details["input"]
    if isinstance(value, Path):
        value = str(value)
    kind, context = details["type"], details.get("ctx", {})
    if kind == "literal_error":
        choices = _metavar(name).strip("{}").split(",")
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{shown}: {value!r} is not one of {', '.join(choices)}{hint}"
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return f"{shown}: {value!r} is not a whole number"
    if kind in ("float_parsing", "float_type", "finite_number"):
        return f"{shown}: {value!r} is not a number"
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than_equal": "le"}
    if kind in bounds:
        words = {"gt": "greater than", "ge": "at least", "le": "at most"}[bounds[kind]]
        return f"{shown}: {value} must be {words} {context[bounds[kind]]}"
    return f"{shown}: {details['msg']}"


def _prefix(origin: str) -> str:
    return f"FairKV configuration {origin}: " if origin and origin != "flags" else ""


def _unknown(key: str) -> str:
    close = difflib.get_close_matches(key, FairKVConfig.model_fields, n=1)
    known = ", ".join(FairKVConfig.model_fields)
    hint = f"did you mean {close[0]}?" if close else f"one of {known}"
    return f"unknown option {key!r}: {hint}"

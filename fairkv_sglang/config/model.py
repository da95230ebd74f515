# SPDX-License-Identifier: Apache-2.0
"""The configuration: its fields, and the options of the methods that it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from fairkv_sglang import registry
from fairkv_sglang.near_miss import did_you_mean
from fairkv_sglang.registry import Options, Registry

if TYPE_CHECKING:
    from fairkv_sglang.budgets import Scorer
    from fairkv_sglang.placement.policies import Policy

DEFAULT_RATIO = 0.25
"""Share of a prompt that is kept when neither a budget nor a ratio is given."""


class Debug(Options):
    """Switches for tests: flags ``--fairkv-debug-...``, a mapping ``debug`` in a file."""

    arena_pages: int | None = Field(
        None, gt=0, description="Head pages of a rank, instead of what the memory allows."
    )
    log_decisions: bool = Field(
        False, description="Log every admission, retraction and owner on every rank."
    )
    forecast_factor: float = Field(
        1.0, gt=0, description="Charge prompts this part of what the last ones let expect."
    )


@lru_cache
def registries() -> Mapping[str, Registry[Any]]:
    """The registry of each field that names a method.

    Imported when first asked: a process without FairKV reads this module and needs none of them.
    """
    from fairkv_sglang.budgets import SCOPES, SCORERS
    from fairkv_sglang.decode_backends import DECODE_BACKENDS
    from fairkv_sglang.placement import POLICIES

    return {
        "scorer": SCORERS,
        "scope": SCOPES,
        "placement": POLICIES,
        "decode_backend": DECODE_BACKENDS,
    }


class FairKVConfig(Options):
    """All options of FairKV. Every field is a flag, a key of the file and a key of
    ``Engine(fairkv={...})``; so is every option of the chosen methods (``registries``), which are
    attributes like the fields.
    """

    model_config = ConfigDict(extra="allow")  # the options of the chosen methods, checked below

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
    budget_least: int | None = Field(
        None, gt=0, description="Tokens that a budget given as a share is never below."
    )
    budget_most: int | None = Field(
        None, gt=0, description="Tokens that a budget given as a share is never above."
    )
    protect_system: bool = Field(
        True,
        description="Keep the system prompt of chat requests whole in every head, inside of the "
        "budget.",
    )
    scorer: str = Field("snapkv", description="What a token is worth")
    scope: str = Field("layer", description="Over what a budget is shared")
    profile: Path | None = Field(
        None, description="Head profile: expected budget share of each head. Scope head needs one."
    )
    placement: str = Field(
        "fair_copying", description="Policy that gives heads, and shares of copied heads, to ranks"
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
    decode_compression: bool = Field(
        False,
        description="Compress outputs, too: each head of a request goes back to its budget every "
        "--fairkv-decode-slack tokens. Needs --fairkv-budget or --fairkv-budget-least.",
    )
    decode_slack: int = Field(
        128,
        ge=32,
        multiple_of=16,
        description="Tokens of output beyond the budget after which a request is compressed.",
    )
    decode_scorer: Literal["attention", "keydiff"] = Field(
        "keydiff",
        description="What a token is worth when outputs are compressed: attention of the last "
        "tokens, or how much its key differs from the others.",
    )
    decode_window: int = Field(
        8,
        gt=0,
        description="Last output tokens, always kept; attention is theirs.",
    )
    decode_redundancy: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Weight of R-KV's redundancy beside attention when outputs are compressed; its "
        "paper has 0.9.",
    )
    decode_backend: str = Field("auto", description="Decode attention")
    debug: Debug = Field(Debug(), description="Switches for tests.")

    @model_validator(mode="before")
    @classmethod
    def _options_of_methods(cls, values: Any) -> Any:
        """Checks what is no field of this class against the chosen methods, and adds defaults."""
        own: dict[str, Any] = {}
        given: dict[str, Any] = {}
        for key, value in settled(values).items():
            (own if key in cls.model_fields else given)[key] = value
        chosen = _chosen(own)
        model = _options_model(tuple(chosen.items()))
        options = {key: given.pop(key) for key in list(given) if key in model.model_fields}
        if given and len(chosen) == len(registries()):
            lines = [
                InitErrorDetails(
                    type=PydanticCustomError("option", "{text}", {"text": _not_had(key, chosen)}),
                    loc=(key,),
                    input=value,
                )
                for key, value in given.items()
            ]
            raise ValidationError.from_exception_data(cls.__name__, lines)
        return {**own, **dict(model.model_validate(options))}

    @field_validator("scorer", "scope", "placement", "decode_backend")
    @classmethod
    def _registered(cls, value: str, info: Any) -> str:
        methods = registries()[info.field_name]
        if value not in methods:
            text = methods.broken().get(value) or registry.not_one_of(value, methods)
            raise PydanticCustomError("method", "{text}", {"text": text})
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
        least, most = self.budget_least, self.budget_most
        if self.budget is not None and (least or most):
            raise PydanticCustomError(
                "exclusive",
                "budget_least and budget_most go with a ratio; a budget in tokens is the same for "
                "every prompt, so leave them out",
            )
        if least and most and least > most:
            raise PydanticCustomError(
                "bounds",
                "budget_least: {least} is above budget_most {most}; exchange them",
                {"least": least, "most": most},
            )
        try:
            scorer = self.make_scorer()
        except ValueError as error:
            raise PydanticCustomError("scorer", "{text}", {"text": str(error)}) from None
        tokens = self.budget if self.budget is not None else most
        if tokens is not None and tokens < scorer.least_budget:
            sink = f" + sink {scorer.sink}" if scorer.sink else ""
            raise PydanticCustomError(
                "budget",
                "{key}: {budget} tokens are too few for scorer {scorer} (window {window}{sink}); "
                "give at least {least}",
                {
                    "key": "budget_most" if self.budget is None else "budget",
                    "budget": tokens,
                    "scorer": self.scorer,
                    "window": scorer.window,
                    "sink": sink,
                    "least": scorer.least_budget,
                },
            )
        if wrong := self._wrong_with_outputs(scorer.window):
            raise PydanticCustomError("decode", "{text}", {"text": wrong})
        if self.profile is None and registries()["scope"][self.scope].needs_profile:
            from fairkv_sglang.budgets.scopes.base import profile_needed

            raise PydanticCustomError("profile", "{text}", {"text": profile_needed(self.scope)})
        return self

    def _wrong_with_outputs(self, window: int) -> str | None:
        """What does not fit together among the options of output compression, in a line."""
        names = ("decode_slack", "decode_scorer", "decode_window", "decode_redundancy")
        if not self.decode_compression:
            for name in names:
                if getattr(self, name) != FairKVConfig.model_fields[name].default:
                    return f"{name} is given but outputs are not compressed: add decode_compression"
            return None
        if self.ratio == 1.0:
            return "decode_compression: a ratio of 1 keeps everything; give budget some tokens"
        if self.budget is None and self.budget_least is None:
            return (
                "decode_compression keeps outputs within a budget in tokens, and a share of a "
                "short prompt is none: give budget, or budget_least beside the ratio"
            )
        if self.decode_redundancy and self.decode_scorer != "attention":
            return "decode_redundancy goes with attention: add decode_scorer attention"
        most = min(window, self.decode_slack)
        if self.decode_window > most:
            return (
                f"decode_window: {self.decode_window} is above the scorer's window {window} or "
                f"decode_slack {self.decode_slack}; give at most {most}"
            )
        return None

    def options(self, field: str) -> dict[str, Any]:
        """Options of the method that ``field`` names."""
        known = registries()[field].options(getattr(self, field))
        return {name: getattr(self, name) for name in known}

    def make_scorer(self) -> Scorer:
        """The scorer with its options."""
        scorer: Scorer = registries()["scorer"].make(self.scorer, **self.options("scorer"))
        return scorer

    def make_policy(self) -> Policy:
        """The placement policy with its options."""
        policy: Policy = registries()["placement"].make(self.placement, **self.options("placement"))
        return policy

    def with_method(self, field: str, name: str) -> FairKVConfig:
        """The same with another method, which takes the options that both have."""
        values = self.model_dump()
        known = registries()[field].options(name)
        for option in self.options(field):
            if option not in known:
                del values[option]
        return FairKVConfig(**{**values, field: name})

    @property
    def effective_ratio(self) -> float | None:
        """The share of a prompt to keep, default applied; None when the budget is a number of
        tokens.
        """
        if self.budget is not None:
            return None
        return DEFAULT_RATIO if self.ratio is None else self.ratio

    @property
    def recent_queries(self) -> int:
        """Output tokens whose queries are kept; 0 where outputs are not compressed by attention."""
        asks = self.decode_compression and self.decode_scorer == "attention"
        return self.decode_window if asks else 0

    def to_json(self) -> str:
        """The value of ``FAIRKV_RESOLVED``."""
        return self.model_dump_json()


registry.reserve([*FairKVConfig.model_fields, *Debug.model_fields])


def settled(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with test switches under ``debug``, wherever they stand."""
    result = dict(values)
    switches = {key: result.pop(key) for key in Debug.model_fields if key in result}
    debug = result.get("debug")
    if switches and (debug is None or isinstance(debug, Mapping)):
        result["debug"] = {**switches, **(debug or {})}
    return result


def _chosen(values: Mapping[str, Any]) -> dict[str, str]:
    """The method of each registry; without those whose name is wrong."""
    names = {key: values.get(key, FairKVConfig.model_fields[key].default) for key in registries()}
    return {key: name for key, name in names.items() if name in registries()[key]}


@lru_cache
def _options_model(chosen: tuple[tuple[str, str], ...]) -> type[Options]:
    """All options of the chosen methods together."""
    fields: dict[str, Any] = {}
    for key, name in chosen:
        for option, field in registries()[key].options(name).items():
            fields.setdefault(option, (field.annotation, field))
    model: type[Options] = create_model("MethodOptions", __base__=Options, **fields)
    return model


def _not_had(option: str, chosen: Mapping[str, str]) -> str:
    """Says which methods have an option that the chosen ones lack."""
    for key, methods in registries().items():
        if having := methods.having(option):
            verb = "has" if len(having) == 1 else "have"
            return f"{key} {chosen[key]} has no such option; {', '.join(having)} {verb} it"
    return unknown(option)


def fields() -> Iterator[tuple[str, FieldInfo, str]]:
    """Everything that can be set: name, type and default, and one or two sentences of help.

    Options of methods stand behind the field that names the method.
    """
    for name, field in FairKVConfig.model_fields.items():
        if name == "debug":
            for switch, debug in Debug.model_fields.items():
                yield f"debug.{switch}", debug, f"For tests: {debug.description}"
        elif name in registries():
            methods = registries()[name]
            summaries = "; ".join(f"{method} = {methods[method].summary}" for method in methods)
            yield name, field, f"{field.description}: {summaries}."
            yield from _options_of(methods)
        else:
            yield name, field, field.description or ""


def _options_of(methods: Registry[Any]) -> Iterator[tuple[str, FieldInfo, str]]:
    known = {option: None for method in methods for option in methods.options(method)}
    for option in known:
        having = methods.having(option)
        named = {method: methods.options(method)[option] for method in having}
        texts = dict.fromkeys(field.description or "" for field in named.values())
        owners = "" if len(having) == len(methods) else f"{', '.join(having)}: "
        yield option, named[having[0]], owners + " ".join(texts)


@lru_cache
def files() -> frozenset[str]:
    """Options that name a file or folder."""
    return frozenset(name for name, field, _ in fields() if field.annotation == Path | None)


def known() -> list[str]:
    """Keys of a configuration; test switches may stand outside of ``debug``."""
    return ["debug", *(name.removeprefix("debug.") for name, _, _ in fields())]


def unknown(key: str) -> str:
    """Says that there is no option of this name, and which was perhaps meant."""
    hint = did_you_mean(key, known()) or f": one of {', '.join(known())}"
    return f"unknown option {key!r}{hint}"

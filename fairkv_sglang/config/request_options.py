# SPDX-License-Identifier: Apache-2.0
"""Options of one request: the mapping ``fairkv`` among SGLang's ``custom_params``.

They travel to the ranks as text, because SGLang's channel has no type for a list of lists.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from fairkv_sglang.budgets import SCOPES, SCORERS, BudgetSpec
from fairkv_sglang.budgets.keep import Keep, merged
from fairkv_sglang.config.model import FairKVConfig, files
from fairkv_sglang.near_miss import did_you_mean
from fairkv_sglang.registry import Options, Registry, explain

KEY = "fairkv"
MOST_TOKENS = 1 << 30
"""Largest number of tokens that is read, beyond any prompt."""
MOST_OF_AN_OPTION = 512
"""Largest whole number of a method's option: more could take memory that nobody has set aside."""
METHODS: dict[str, Registry[Any]] = {"scorer": SCORERS, "scope": SCOPES}
"""What a request may name, with options that stand beside the name."""


class RequestOptions(Options):
    """What a request may ask for instead of the server's settings."""

    model_config = ConfigDict(strict=True)

    budget: int | None = Field(
        None,
        gt=0,
        le=MOST_TOKENS,
        description="Tokens of the prompt that a head keeps, on average over all heads.",
    )
    ratio: float | None = Field(
        None, gt=0, le=1, description="The budget as a share of the prompt."
    )
    compress: bool = Field(True, description="Whether the prompt is compressed at all.")
    protect: list[Annotated[list[int], Field(min_length=2, max_length=2)]] | None = Field(
        None, description="Tokens [start, end) of the prompt that every head keeps."
    )
    scorer: dict[str, Any] | None = Field(
        None, description="Another scorer than the server's: its name and all its options."
    )
    scope: dict[str, Any] | None = Field(None, description="The same for the budget scope.")

    @property
    def keep(self) -> Keep:
        """What is to be kept of the prompt."""
        spec = None
        if not self.compress:
            spec = BudgetSpec(ratio=1.0)
        elif self.budget is not None or self.ratio is not None:
            spec = BudgetSpec(self.budget, self.ratio)
        scorer = None if self.scorer is None else SCORERS.make(**self.scorer)
        scope = None
        if self.scope is not None:
            options = ((k, v) for k, v in self.scope.items() if k != "name")
            scope = self.scope["name"], tuple(sorted(options))
        return Keep(spec, merged((start, end) for start, end in self.protect or ()), scorer, scope)

    def to_text(self) -> str:
        """For :func:`keep_of_text`."""
        return self.model_dump_json(exclude_none=True)


def keep_of_text(text: str) -> Keep:
    """What :meth:`RequestOptions.to_text` has written."""
    return RequestOptions.model_validate_json(text).keep


def read_request_options(
    values: Any, *, server: FairKVConfig, prompt_len: int | None
) -> RequestOptions:
    """The options of a request.

    Args:
        values: As they came.
        server: The server's configuration.
        prompt_len: Tokens of the prompt; None where its first tokens are not in the request.

    Raises:
        ValueError: in one line.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{KEY} must map options to values, not {values!r}.")
    known = list(RequestOptions.model_fields)
    of_methods = {o for methods in METHODS.values() for m in methods for o in methods.options(m)}
    for key in values:
        if key not in known and key not in of_methods:
            hint = did_you_mean(key, [*known, *of_methods]) or f": there are {', '.join(known)}"
            raise ValueError(f"{KEY} has no option {key!r}{hint}.")
    for key in values.keys() & files():
        raise ValueError(
            f"{KEY}.{key} names a file, which is the server's to choose; leave it out."
        )
    given = {key: value for key, value in values.items() if value is not None}
    named = {key: given.pop(key) for key in list(given) if key in of_methods or key in METHODS}
    try:
        options = RequestOptions.model_validate(given)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        raise ValueError(f"{KEY}.{explain(details)}.") from None
    if options.budget is not None and options.ratio is not None:
        raise ValueError(f"{KEY}: give budget or ratio, not both.")
    if not options.compress and (options.budget or options.ratio):
        raise ValueError(f"{KEY}: compress false keeps everything; leave budget and ratio out.")
    config = _with_methods(server, named, options)
    least = config.make_scorer().least_budget
    if options.budget is not None and options.budget < least:
        raise ValueError(
            f"{KEY}.budget: {options.budget} tokens are too few for scorer {config.scorer}; give "
            f"at least {least}."
        )
    _check_spans(options.protect or [], prompt_len)
    own = {
        field: {"name": getattr(config, field), **config.options(field)}
        for field, methods in METHODS.items()
        if any(key == field or key in methods.options(getattr(config, field)) for key in named)
    }
    return options.model_copy(update=own)


def _with_methods(
    server: FairKVConfig, named: dict[str, Any], options: RequestOptions
) -> FairKVConfig:
    """The configuration of a server that serves the request as it wants.

    A method that it names begins with that method's defaults; options without a name change the
    server's method.
    """
    if not named:
        return server
    values = server.model_dump(exclude={"plan"})
    for field in METHODS:
        if field in named:
            for option in server.options(field):
                # The scorer's own weights, if it is the server's scorer, go on being its.
                if option not in files() or named[field] != getattr(server, field):
                    values.pop(option, None)
    if not options.compress or options.budget or options.ratio:
        values |= {"budget": None, "ratio": 1.0, "budget_least": None, "budget_most": None}
    try:
        config = FairKVConfig.model_validate(values | named)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        place = "." if details["loc"] else ": "
        raise ValueError(f"{KEY}{place}{explain(details)}.") from None
    for key in named:
        if isinstance(value := getattr(config, key), int) and value > MOST_OF_AN_OPTION:
            raise ValueError(f"{KEY}.{key}: {value} must be at most {MOST_OF_AN_OPTION}.")
    return config


def _check_spans(spans: list[list[int]], prompt_len: int | None) -> None:
    if spans and prompt_len is None:
        raise ValueError(f"{KEY}.protect counts tokens of a whole prompt; a session has parts.")
    for start, end in spans:
        if not 0 <= start <= end:
            raise ValueError(
                f"{KEY}.protect: [{start}, {end}] is no span; give the first token and the one "
                "after the last, counted from 0."
            )
        if prompt_len is not None and end > prompt_len:
            raise ValueError(
                f"{KEY}.protect: [{start}, {end}] is beyond the prompt, which has {prompt_len} "
                "tokens."
            )

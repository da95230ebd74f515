# SPDX-License-Identifier: Apache-2.0
"""Options of one request: the mapping ``fairkv`` among SGLang's ``custom_params``.

They travel to the ranks as text, because SGLang's channel has no type for a list of lists.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from fairkv_sglang.budgets import BudgetSpec
from fairkv_sglang.budgets.keep import Keep, merged
from fairkv_sglang.near_miss import did_you_mean
from fairkv_sglang.registry import Options, explain

KEY = "fairkv"
MOST_TOKENS = 1 << 30
"""Largest number of tokens that is read, beyond any prompt."""


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

    @property
    def keep(self) -> Keep:
        """What is to be kept of the prompt."""
        spec = None
        if not self.compress:
            spec = BudgetSpec(ratio=1.0)
        elif self.budget is not None or self.ratio is not None:
            spec = BudgetSpec(self.budget, self.ratio)
        return Keep(spec, merged((start, end) for start, end in self.protect or ()))

    def to_text(self) -> str:
        """For :func:`keep_of_text`."""
        return self.model_dump_json(exclude_none=True)


def keep_of_text(text: str) -> Keep:
    """What :meth:`RequestOptions.to_text` has written."""
    return RequestOptions.model_validate_json(text).keep


def read_request_options(
    values: Any, *, least_budget: int, prompt_len: int | None
) -> RequestOptions:
    """The options of a request.

    Args:
        values: As they came.
        least_budget: Fewest tokens of a budget, the window of the server's scorer included.
        prompt_len: Tokens of the prompt; None where its first tokens are not in the request.

    Raises:
        ValueError: in one line.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{KEY} must map options to values, not {values!r}.")
    known = list(RequestOptions.model_fields)
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known) or f": there are {', '.join(known)}"
            raise ValueError(f"{KEY} has no option {key!r}{hint}.")
    try:
        options = RequestOptions.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        raise ValueError(f"{KEY}.{explain(details)}.") from None
    if options.budget is not None and options.ratio is not None:
        raise ValueError(f"{KEY}: give budget or ratio, not both.")
    if not options.compress and (options.budget or options.ratio):
        raise ValueError(f"{KEY}: compress false keeps everything; leave budget and ratio out.")
    if options.budget is not None and options.budget < least_budget:
        raise ValueError(
            f"{KEY}.budget: {options.budget} tokens are too few for this server's scorer; give at "
            f"least {least_budget}."
        )
    _check_spans(options.protect or [], prompt_len)
    return options


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

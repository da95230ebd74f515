# SPDX-License-Identifier: Apache-2.0
"""A hook on SGLang's check of a request: what would stop all ranks is answered by status 400."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from fairkv_sglang.budgets import SCORERS
from fairkv_sglang.config import RESOLVED_VARIABLE, FairKVConfig, from_environment
from fairkv_sglang.config.request_options import KEY, RequestOptions, read_request_options
from fairkv_sglang.patches.ledger import Hook

SYSTEM_TOKENS = "__fairkv_system_tokens"
"""Entry of ``custom_params`` between the hook on chats and that on the tokenized request."""
LARGEST_BIAS = 1e4
"""OpenAI's interface ends at 100. Divided by SGLang's lowest temperature this is finite."""


def before_validate(manager: Any, obj: Any, input_ids: Sequence[int] | None) -> None:
    """SGLang has tokenized a request and checks it.

    Raises:
        ValueError: SGLang answers it by status 400.
    """
    embeddings = getattr(obj, "input_embeds", None)
    check_request(input_ids, embeddings, obj.sampling_params or {})
    scorer = configuration().scorer
    if embeddings is not None and SCORERS[scorer].repeats:
        raise ValueError(
            f"fairkv: scorer {scorer} repeats the tokens of a prompt, embeddings have none."
        )
    for name in ("top_logprobs_num", "logprob_start_len"):
        if isinstance(value := getattr(obj, name, None), list):
            raise ValueError(f"{name} of a single request must be a number, not {value}.")


def check_request(
    input_ids: Sequence[int] | None, input_embeds: object, sampling: Mapping[str, Any]
) -> None:
    """Refuse a request without tokens, and biases that make no probabilities.

    Args:
        input_ids: Its tokens; None if it has embeddings.
        input_embeds: Those.
        sampling: Its sampling parameters as they came.

    Raises:
        ValueError: in one line.
    """
    if input_ids is not None and not len(input_ids) and input_embeds is None:
        raise ValueError("The input has no tokens: give at least one.")
    bias = sampling.get("logit_bias")
    if not isinstance(bias, Mapping | None):
        raise ValueError(f"logit_bias must map tokens to numbers, not {bias!r}.")
    for token, value in (bias or {}).items():
        number = isinstance(value, int | float) and math.isfinite(value)
        if not number or abs(value) > LARGEST_BIAS:
            raise ValueError(
                f"logit_bias of token {token} must be a number from {-LARGEST_BIAS:g} to "
                f"{LARGEST_BIAS:g}, not {value}."
            )


def after_create_tokenized(result: Any, manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang has made what it sends to the ranks: FairKV's options become text.

    Raises:
        ValueError: SGLang answers it by status 400.
    """
    sampling = result.sampling_params
    if isinstance(sampling.custom_params, dict):
        given = dict(sampling.custom_params)
        tokens = result.input_ids if result.input_ids is not None else obj.input_embeds
        whole = not getattr(obj, "session_params", None)  # a turn is but a part of its prompt
        prompt_len = len(tokens) if whole and tokens is not None else None
        system = given.pop(SYSTEM_TOKENS, 0)
        system = system if isinstance(system, int) else 0  # a client may have sent it
        options = options_of(given.pop(KEY, None), max(system, 0), prompt_len)
        sampling.custom_params = given if options is None else {**given, KEY: options.to_text()}
    check_types(sampling)


def options_of(values: Any, system_tokens: int, prompt_len: int | None) -> RequestOptions | None:
    """Options of a request, its system prompt among what it protects; None if it has none.

    Args:
        values: As they came.
        system_tokens: Tokens of its system prompt.
        prompt_len: As :func:`read_request_options` has it.

    Raises:
        ValueError: in one line.
    """
    config = configuration()
    options = None
    if values is not None:
        options = read_request_options(values, server=config, prompt_len=prompt_len)
    if system_tokens and prompt_len and config.protect_system:
        options = options or RequestOptions()
        spans = [[0, min(system_tokens, prompt_len)], *(options.protect or [])]
        options = options.model_copy(update={"protect": spans})
    return options


def configuration() -> FairKVConfig:
    """The server's, in whichever process."""
    return _configuration(os.environ.get(RESOLVED_VARIABLE))


@lru_cache
def _configuration(resolved: str | None) -> FairKVConfig:
    environment = {} if resolved is None else {RESOLVED_VARIABLE: resolved}
    return from_environment(environment) or FairKVConfig()


def check_types(sampling: Any) -> None:
    """Refuse sampling parameters that ranks could not read: one of another type ends them.

    Args:
        sampling: SGLang's sampling parameters, checked by SGLang for values only.

    Raises:
        ValueError: in one line.
    """
    import msgspec

    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=type(sampling))
    except (msgspec.MsgspecError, TypeError, OverflowError) as error:
        problem, _, place = str(error).partition(" - at ")
        number = re.match(r"`\$\[(\d+)\]", place)
        field = type(sampling).__struct_fields__[int(number[1])] + ": " if number else ""
        raise ValueError(f"sampling_params: {field}{problem}.") from None


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        kind="before",
        function=before_validate,
        why="a request without tokens, or with a logit bias that makes NaN, stops every rank",
        since="0.5.17",
        upstream="sglang/srt/managers/tokenizer_manager.py",
        test="tests/engine/test_server.py",
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        kind="after",
        function=after_create_tokenized,
        why="a request's own options are checked and sent to the ranks; sampling parameters of "
        "another type than SGLang's channel has would stop every rank",
        since="0.5.17",
        upstream="sglang/srt/managers/tokenizer_manager.py",
        test="tests/engine/test_request_options.py",
    ),
)

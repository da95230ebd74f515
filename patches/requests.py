# SPDX-License-Identifier: Apache-2.0
"""A hook on SGLang's check of a request: what would stop all ranks is answered by status 400."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fairkv_sglang.patches.ledger import Hook

LARGEST_BIAS = 1e4
"""OpenAI's interface ends at 100. Divided by SGLang's lowest temperature this is finite."""


def before_validate(manager: Any, obj: Any, input_ids: Sequence[int] | None) -> None:
    """SGLang has tokenized a request and checks it.

    Raises:
        ValueError: SGLang answers it by status 400.
    """
    check_request(input_ids, getattr(obj, "input_embeds", None), obj.sampling_params or {})
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
)

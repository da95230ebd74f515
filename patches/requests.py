# SPDX-License-Identifier: Apache-2.0
"""Hooks on SGLang's checks of a request: what would stop all ranks is answered by status 400."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import msgspec

from fairkv_sglang.patches.ledger import Hook

LARGEST_BIAS = 1e4
"""OpenAI's interface ends at 100. Divided by SGLang's lowest temperature this is finite."""
NOT_CHECKED = ("input_text", "input_ids", "input_embeds", "mm_inputs", "time_stats")
"""Fields that are long, or that SGLang packs when it sends the request."""


def before_validate(manager: Any, obj: Any, input_ids: Sequence[int] | None) -> None:
    """SGLang has tokenized a request and checks it.

    Raises:
        ValueError: SGLang answers it by status 400.
    """
    check_request(input_ids, getattr(obj, "input_embeds", None), obj.sampling_params or {})


def check_request(
    input_ids: Sequence[int] | None, input_embeds: object, sampling: Mapping[str, Any]
) -> None:
    """Refuse a request without tokens, and probabilities that are no numbers.

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
    for token, value in bias.items() if isinstance(bias, Mapping) else ():
        number = isinstance(value, int | float) and math.isfinite(value)
        if not number or abs(value) > LARGEST_BIAS:
            raise ValueError(
                f"logit_bias of token {token} must be a number from {-LARGEST_BIAS:g} to "
                f"{LARGEST_BIAS:g}, not {value}."
            )


def after_create(result: msgspec.Struct, *args: Any, **kwargs: Any) -> None:
    """A request is ready to be sent to the ranks.

    Raises:
        ValueError: SGLang answers it by status 400.
    """
    from sglang.srt.environ import envs

    if not envs.SGLANG_USE_PICKLE_IPC.get():
        check_types(result)


def check_types(sent: msgspec.Struct) -> None:
    """Refuse what the ranks could not decode: they do so by the types of the fields.

    Args:
        sent: A request as SGLang sends it, or its sampling parameters.

    Raises:
        ValueError: in one line, naming the field.
    """
    from sglang.srt.utils.msgpack_utils import enc_hook

    for name, decoder in _decoders(type(sent)):
        value = getattr(sent, name)
        try:
            decoder.decode(msgspec.msgpack.encode(value, enc_hook=enc_hook))
        except msgspec.ValidationError as error:
            if isinstance(value, msgspec.Struct):
                check_types(value)
            raise ValueError(f"{name} has a wrong type: {error}.") from None


@cache
def _decoders(kind: type[msgspec.Struct]) -> list[tuple[str, msgspec.msgpack.Decoder[Any]]]:
    from sglang.srt.utils.msgpack_utils import dec_hook, ext_hook

    return [
        (f.name, msgspec.msgpack.Decoder(f.type, dec_hook=dec_hook, ext_hook=ext_hook))
        for f in msgspec.structs.fields(kind)
        if f.name not in NOT_CHECKED
    ]


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
        function=after_create,
        why="a parameter of another type, 4.5 new tokens say, stops rank 0",
        since="0.5.21",
        upstream="sglang/srt/managers/scheduler_components/request_receiver.py (sock_recv)",
        test="tests/engine/test_server.py",
    ),
)

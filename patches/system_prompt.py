# SPDX-License-Identifier: Apache-2.0
"""A hook on chat requests: how many tokens of the prompt are its system prompt."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import sha256
from itertools import takewhile
from time import time
from typing import Any

from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.patches.requests import SYSTEM_TOKENS, configuration

ROLES = ("system", "developer")
RECENT = 64
"""System prompts whose tokens are remembered, for a minute: templates may tell date and time."""
_MEMORY = "_fairkv_system_prompts"


def after_convert_request(result: Any, serving: Any, request: Any, *args: Any, **named: Any) -> Any:
    """SGLang has rendered and tokenized a chat."""
    adapted, processed = result
    if not configuration().protect_system:
        return result
    if isinstance(adapted.input_ids, list) and processed.input_ids is None:
        count = system_tokens(serving, processed, adapted.input_ids)
        if count:
            sampling = dict(adapted.sampling_params)
            given = sampling.get("custom_params") or {}
            sampling["custom_params"] = {**given, SYSTEM_TOKENS: count}
            adapted.sampling_params = sampling
    return result


def system_tokens(serving: Any, request: Any, prompt: list[int]) -> int:
    """First tokens of a chat that come from its system messages and do not depend on the others.

    These are the tokens that the prompt has in common with one that goes on differently after the
    same system messages: with the template's marks around them and its tools. Where a template puts
    the system message elsewhere, what comes before the other messages is protected and no more.

    Args:
        serving: SGLang's chat endpoint, which renders.
        request: The chat.
        prompt: Its tokens.
    """
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionMessageUserParam

    leading = list(takewhile(lambda message: message.role in ROLES, request.messages))
    if not leading:
        return 0
    other = ChatCompletionMessageUserParam(role="user", content="0")
    changed = _rendered(serving, request.model_copy(update={"messages": [*leading, other]}))
    pairs = zip(prompt, changed, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _rendered(serving: Any, request: Any) -> list[int]:
    """Tokens of a chat, empty if the template takes no such chat; the last ones are remembered."""
    recent: OrderedDict[bytes, list[int]] = vars(serving).setdefault(_MEMORY, OrderedDict())
    # With all that a template may look at: tools, its own arguments, ...
    said = f"{time() // 60} {request.model_dump_json()}"
    key = sha256(said.encode()).digest()
    if key not in recent:
        multimodal = serving.tokenizer_manager.model_config.is_multimodal
        try:
            recent[key] = list(serving._process_messages(request, multimodal).prompt_ids)
        except ValueError:
            recent[key] = []
        if len(recent) > RECENT:
            recent.popitem(last=False)
    recent.move_to_end(key)
    return recent[key]


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat."
        "_convert_to_internal_request",
        kind="after",
        function=after_convert_request,
        why="only the chat endpoint knows where the system prompt ends, which heads keep whole",
        since="0.5.17",
        upstream="sglang/srt/entrypoints/openai/serving_chat.py",
        test="tests/engine/test_serving.py",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""Where the system prompt of a chat ends, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

from fairkv_sglang.budgets import BudgetSpec, Keep
from fairkv_sglang.config import RESOLVED_VARIABLE, FairKVConfig
from fairkv_sglang.config.request_options import KEY
from fairkv_sglang.patches import system_prompt
from fairkv_sglang.patches.request_options import keep_of
from fairkv_sglang.patches.requests import SYSTEM_TOKENS, after_create_tokenized
from fairkv_sglang.patches.system_prompt import RECENT, after_convert_request, system_tokens

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "hello"}


def with_roles(messages: list[Any]) -> str:
    return "".join(f"<{m.role}>{m.content}\n" for m in messages) + "<assistant>"


def system_last(messages: list[Any]) -> str:
    """As templates that put it before the last message of the user."""
    system = [m.content for m in messages if m.role == "system"]
    *others, last = [m.content for m in messages if m.role != "system"]
    return "[" + "][".join([*others, "".join(system) + last]) + "]"


def no_system(messages: list[Any]) -> str:
    raise ValueError("this template takes no system message")


def chat(*messages: dict[str, str], **options: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(model="tiny", messages=list(messages), **options)


class Chat:
    """SGLang's chat endpoint with one token for each character."""

    def __init__(self, template: Callable[[list[Any]], str]) -> None:
        self.template, self.rendered = template, 0
        config = SimpleNamespace(is_multimodal=False)
        self.tokenizer_manager = SimpleNamespace(model_config=config)

    def _process_messages(self, request: ChatCompletionRequest, is_multimodal: bool) -> Any:
        assert not is_multimodal
        self.rendered += 1
        return SimpleNamespace(prompt_ids=[ord(x) for x in self.template(request.messages)])

    def tokens(self, request: ChatCompletionRequest) -> list[int]:
        found: list[int] = self._process_messages(request, False).prompt_ids
        return found

    def protected(self, *messages: dict[str, str]) -> str:
        """The text of the tokens that are the system prompt's."""
        request = chat(*messages)
        prompt = self.tokens(request)
        return "".join(map(chr, prompt[: system_tokens(self, request, prompt)]))


def test_the_system_prompt_ends_where_the_chat_goes_on() -> None:
    rendered = Chat(with_roles)
    assert rendered.protected(SYSTEM, USER) == "<system>be brief\n<user>"
    assert rendered.protected(SYSTEM, SYSTEM, USER, SYSTEM).count("brief") == 2
    assert rendered.protected({**SYSTEM, "role": "developer"}, USER).startswith("<developer>be b")
    assert rendered.protected(SYSTEM, {"role": "assistant", "content": "hi"}, USER) == (
        "<system>be brief\n<"
    )
    assert rendered.protected(USER, SYSTEM) == rendered.protected(USER) == ""


def test_templates_that_put_it_elsewhere() -> None:
    rendered = Chat(system_last)
    assert rendered.protected(SYSTEM, USER) == "[be brief"
    assert rendered.protected(SYSTEM, USER, USER) == "["
    request = chat(SYSTEM, USER)
    assert system_tokens(Chat(no_system), request, [1, 2, 3]) == 0


def test_recent_system_prompts_are_not_rendered_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user says; other tools, or arguments of the template, are another prompt."""
    now = [59.0]
    monkeypatch.setattr(system_prompt, "time", lambda: now[0])
    rendered = Chat(with_roles)
    for text in ("hello", "and?"):
        assert system_tokens(rendered, chat(SYSTEM, {**USER, "content": text}), [60]) == 1
    assert rendered.rendered == 1
    system_tokens(rendered, chat(SYSTEM, USER, chat_template_kwargs={"short": True}), [60])
    assert rendered.rendered == 2
    for number in range(RECENT):  # the first ones are forgotten
        system_tokens(rendered, chat({**SYSTEM, "content": str(number)}, USER), [60])
    system_tokens(rendered, chat(SYSTEM, USER), [60])
    assert rendered.rendered == 2 + RECENT + 1
    now[0] = 60.0  # the template may say so
    system_tokens(rendered, chat(SYSTEM, USER), [60])
    assert rendered.rendered == 2 + RECENT + 2


def test_nothing_is_rendered_where_it_is_not_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FairKVConfig(enabled=True, protect_system=False)
    monkeypatch.setenv(RESOLVED_VARIABLE, config.to_json())
    assert converted(chat(SYSTEM, USER)).sampling_params["custom_params"] is None


def converted(request: ChatCompletionRequest, **made: Any) -> Any:
    """What leaves the hook on the conversion."""
    sampling = {"custom_params": request.custom_params}
    rendered = Chat(with_roles)
    made = {"input_ids": rendered.tokens(request), "sampling_params": sampling, **made}
    result = (SimpleNamespace(**made), request)
    assert after_convert_request(result, rendered, request, None) is result
    return result[0]


def test_its_length_goes_with_the_request() -> None:
    options = {KEY: {"budget": 50}}
    request = chat(SYSTEM, USER, custom_params=options)
    sent = converted(request)
    assert sent.sampling_params["custom_params"] == {**options, SYSTEM_TOKENS: 23}
    assert request.custom_params == options
    assert converted(chat(SYSTEM, USER)).sampling_params["custom_params"] == {SYSTEM_TOKENS: 23}
    assert converted(chat(USER)).sampling_params["custom_params"] is None
    assert converted(chat(SYSTEM, USER), input_ids="text").sampling_params["custom_params"] is None
    given = chat(SYSTEM, USER, input_ids=[5, 6])  # the client rendered it
    assert converted(given).sampling_params["custom_params"] is None


@pytest.mark.parametrize("protect", [True, False])
@pytest.mark.parametrize(
    ("custom", "spec", "spans", "protected"),
    [
        ({}, None, (), ((0, 23),)),
        ({KEY: None}, None, (), ((0, 23),)),
        ({KEY: {"ratio": 0.5}}, BudgetSpec(ratio=0.5), (), ((0, 23),)),
        ({KEY: {"protect": [[9, 30]]}}, None, ((9, 30),), ((0, 30),)),
        ({SYSTEM_TOKENS: 900}, None, (), ((0, 40),)),  # the prompt was cut
        ({SYSTEM_TOKENS: "many"}, None, (), ()),
        ({SYSTEM_TOKENS: -3}, None, (), ()),
    ],
)
def test_it_is_protected_unless_the_server_says_no(
    protect: bool,
    custom: dict[str, Any],
    spec: BudgetSpec | None,
    spans: tuple[tuple[int, int], ...],
    protected: tuple[tuple[int, int], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.sampling.sampling_params import SamplingParams

    config = FairKVConfig(enabled=True, protect_system=protect)
    monkeypatch.setenv(RESOLVED_VARIABLE, config.to_json())
    sampling = SamplingParams(custom_params={SYSTEM_TOKENS: 23, **custom})
    sampling.normalize(None)
    made = SimpleNamespace(sampling_params=sampling, input_ids=[1] * 40)
    after_create_tokenized(made, None, SimpleNamespace(session_params=None))
    assert SYSTEM_TOKENS not in sampling.custom_params
    assert keep_of(made) == Keep(spec, protected if protect else spans)

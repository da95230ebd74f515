# SPDX-License-Identifier: Apache-2.0
"""Asks a server with OpenAI's ``/v1/completions``; prompts are token ids.

The prompt of a sample is cut in two, context and question. *Query-aware*: both are sent as one
prompt. *Query-agnostic*: the server compresses the context before it sees the question. FairKV
compresses at the end of a prompt, so the context is the prompt and the question's tokens are forced
as output (``patches/forced_tokens.py``). A full cache answers the same either way: without FairKV
the two modes send the same prompt.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any, Literal

from fairkv_sglang.evaluation.tasks import Sample

Mode = Literal["aware", "agnostic"]
FORCED = "fairkv_forced_ids"
# The class by name, as pickle has it; the server imports it.
PROCESSOR = json.dumps({"callable": b"cfairkv_sglang.patches.forced_tokens\nForcedTokens\n.".hex()})
_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: Without special tokens.
        tokens: Its tokens as text, the end of sequence included where it was reached.
        top: The most probable tokens at each of them, with log probabilities; None where the server
            gives none.
        prompt_tokens: Tokens of context and question.
    """

    text: str
    tokens: list[str]
    top: list[dict[str, float]] | None
    prompt_tokens: int


class Prompts:
    """From samples to token ids.

    Args:
        tokenizer: A Hugging Face tokenizer; its chat template is used if it has one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Not `all_special_tokens`: the end of a turn need not be a named one (Phi-3's is not).
        added = tokenizer.added_tokens_decoder.values()
        self.special = [token.content for token in added if token.special and token.content]

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def split(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Token ids of the context with all that precedes it, and of all that follows it."""
        if sample.verbatim:
            before, after = sample.context, sample.question
        elif not self.tokenizer.chat_template:
            head = sample.system + _BETWEEN if sample.system else ""
            before = head + sample.context
            after = f"{_BETWEEN}Question: {sample.question}\nAnswer:"
        else:
            said = f"{sample.context}{_BETWEEN}{sample.question}"
            messages = [{"role": "user", "content": said}]
            if sample.system:
                messages.insert(0, {"role": "system", "content": sample.system})
            whole = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            start, found, rest = whole.rpartition(sample.context)
            if not found:
                raise ValueError("the tokenizer's chat template changes the text of a message")
            before, after = start + found, rest
        # A template has its own first token; plain text gets the tokenizer's.
        plain = sample.verbatim or not self.tokenizer.chat_template
        first = self.tokenizer(before, add_special_tokens=plain).input_ids
        return list(first), list(self.tokenizer(after, add_special_tokens=False).input_ids)

    def cut(self, text: str) -> str:
        """The text before the first special token."""
        ends = [at for token in self.special if (at := text.find(token)) >= 0]
        return text[: min(ends)] if ends else text


@dataclass(frozen=True)
class Client:
    """One server.

    Attributes:
        url: ``http://HOST:PORT``, without ``/v1``.
        model: Its name in requests.
        prompts: Makes token ids.
        api_key: Sent as ``Authorization: Bearer``.
        force: Whether questions of the query-agnostic mode are forced; without, they are sent with
            their context, which is right for a full cache only.
        top: Most probable tokens to ask for; 0 asks for none.
        options: FairKV's options of each request (``custom_params.fairkv``).
        timeout: Seconds that an answer may take.
    """

    url: str
    model: str
    prompts: Prompts
    api_key: str | None = None
    force: bool = False
    top: int = 5
    options: dict[str, Any] = field(default_factory=dict)
    timeout: float = 900.0

    def ask(self, sample: Sample, mode: Mode) -> Answer:
        """The greedy answer.

        Raises:
            ValueError: in one line: the server is silent, refuses, or did not force the question.
        """
        context, question = self.prompts.split(sample)
        forced = question if self.force and mode == "agnostic" else []
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": context if forced else context + question,
            "max_tokens": sample.new_tokens + len(forced),
            "temperature": 0,
        }
        if self.top:
            body["logprobs"] = self.top
        params: dict[str, Any] = {"fairkv": self.options} if self.options else {}
        if forced:
            # The question may hold the token that ends an answer (the template's end of a turn).
            body |= {"ignore_eos": True, "skip_special_tokens": False}
            body["custom_logit_processor"] = PROCESSOR
            params[FORCED] = forced
        if params:
            body["custom_params"] = params
        choice = post(self.url + "/v1/completions", body, self.api_key, self.timeout)["choices"][0]
        text: str = choice["text"]
        if forced:
            asked = self.prompts.tokenizer.decode(forced, skip_special_tokens=False)
            if not text.lstrip().startswith(asked.lstrip()):
                raise ValueError(
                    "the server did not ask the question after its context: FairKV's server needs "
                    f"--enable-custom-logit-processor (it began with {text[:40]!r})"
                )
            text = text.lstrip()[len(asked.lstrip()) :]
        text = self.prompts.cut(text)
        tokens, top = self._tokens(choice.get("logprobs"), len(forced), text)
        return Answer(text.strip(), tokens, top, len(context) + len(question))

    def _tokens(
        self, logprobs: dict[str, Any] | None, skip: int, text: str
    ) -> tuple[list[str], list[dict[str, float]] | None]:
        """Tokens of the answer up to its end, from the server or, without, from the tokenizer."""
        if not logprobs or not logprobs.get("tokens"):
            return list(self.prompts.tokenizer.tokenize(text)), None
        tokens = [str(token) for token in logprobs["tokens"][skip:]]
        ends = (i + 1 for i, token in enumerate(tokens) if token in self.prompts.special)
        length = next(ends, len(tokens))
        top = logprobs.get("top_logprobs")
        if not top:
            return tokens[:length], None
        kept = top[skip : skip + length]
        rounded = [{t: round(p, 4) for t, p in (at or {}).items() if p is not None} for at in kept]
        return tokens[:length], rounded


def post(
    url: str, body: dict[str, Any] | None, api_key: str | None = None, timeout: float = 60.0
) -> Any:
    """JSON answer to a POST, or to a GET without ``body``; ValueError in one line without one."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    if api_key:  # for this address alone, wherever it may lead
        request.add_unredirected_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(2000).decode(errors="replace")
        raise ValueError(f"{url} answers {error.code}: {_message(said)}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(
            f"no answer from {url} ({error}): run the command again to go on"
        ) from None


def _message(body: str) -> str:
    """The message in an error's body."""
    try:
        found = json.loads(body)
        return str(found.get("message") or found["error"]["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return " ".join(body.split())[:200]

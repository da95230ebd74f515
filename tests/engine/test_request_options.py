# SPDX-License-Identifier: Apache-2.0
"""Requests with options of their own: each is served as by a server with these settings, whoever
else is in its batch.

The scorer keeps random tokens, so that answers depend on what is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind everything else: kernels/ must not be found first

from demo.prompts import is_exact, make_prompts  # noqa: E402

MODEL = ROOT / "demo" / "model"
PROMPTS = make_prompts(seed=44_000, count=8, tokens=700, facts=4)
TOKENS = [prompt.token_ids for prompt in PROMPTS]
ENGINE: dict[str, Any] = {
    "tp_size": 2,
    "max_total_tokens": 16384,
    "chunked_prefill_size": 256,
}
METHOD: dict[str, Any] = {"scorer": "random", "scope": "layer"}
Options = dict[str, Any] | None


@pytest.fixture
def engine(start_engine: Callable[..., Any]) -> Any:
    """TP 2, half of the prompts, heads of at most 800 tokens."""
    return start_engine(MODEL, fairkv={**METHOD, "ratio": 0.5, "max_head_tokens": 800}, **ENGINE)


def ask(engine: Any, options: list[Options], tokens: list[list[int]] = TOKENS) -> list[list[int]]:
    """Answers to all prompts, in one batch, each with its options."""
    sampling = [
        {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
        | ({"custom_params": {"fairkv": each}} if each is not None else {})
        for each in options
    ]
    results = engine.call("generate", input_ids=tokens, sampling_params=sampling)
    return [result["output_ids"] for result in results]


def fact(number: int) -> list[int]:
    """Where the sentence with the answer stands in a prompt, and its first words."""
    tokens, answer = TOKENS[number], PROMPTS[number].answer_ids
    at = next(i for i in range(len(tokens)) if tokens[i : i + len(answer)] == answer)
    return [at - 6, at + len(answer) + 1]


def right(answers: list[list[int]]) -> int:
    return sum(is_exact(p, a) for p, a in zip(PROMPTS, answers, strict=True))


def test_a_mixed_batch_is_served_as_each_request_alone(engine: Any) -> None:
    options: list[Options] = [
        None,
        {"budget": 120, "scope": "model"},
        {"ratio": 0.1, "scorer": "h2o", "scope": "threshold", "threshold": 0.01},
        {"compress": False},
        {"ratio": 0.1, "protect": [fact(4)]},
        # More than half of the prompt, over two chunks.
        {"protect": [[0, 300], [250, 600]], "scorer": "tova", "window": 64},
        {"budget": 1 << 20, "scorer": "compactor"},
        {"compress": True, "protect": [], "scope": "rank"},
    ]
    mixed = ask(engine, options)
    alone = [ask(engine, [o], [t])[0] for o, t in zip(options, TOKENS, strict=True)]  # prefix hits
    assert mixed == alone
    engine.call("empty_cache")
    assert ask(engine, options[::-1], TOKENS[::-1]) == mixed[::-1]
    assert engine.fairkv()["decisions_agree"]


@pytest.mark.sweep  # more servers
def test_options_of_a_request_are_those_of_a_server(
    engine: Any, start_engine: Callable[..., Any]
) -> None:
    """Of one rank: no scope here depends on their number."""
    servers: list[Options] = [
        {**METHOD, "budget": 120},
        {"scorer": "keydiff", "scope": "model", "ratio": 0.1},
        {"scorer": "h2o", "scope": "threshold", "threshold": 0.01, "ratio": 0.5},
        {"scorer": "snapkv", "window": 16, "scope": "pyramid", "ratio": 0.2},
        None,  # stock
    ]
    found = []
    for fairkv in servers:
        other = start_engine(MODEL, fairkv=fairkv, **{**ENGINE, "tp_size": 1})
        if fairkv is None:
            found.append(ask(other, [None] * 8))
            assert ask(engine, [{"compress": False}] * 8) == found[-1]
        else:
            answers, kept = kept_of(other, None)
            assert kept_of(engine, fairkv) == (answers, kept)
            found.append(answers)
        other.close()
    assert len({str(answers) for answers in found}) == len(servers)


def kept_of(engine: Any, options: Options) -> tuple[list[list[int]], list[list[int]]]:
    """Answers to all prompts with these options, and what was kept of them."""
    before = np.array(engine.fairkv()["kept"]["tokens"])
    answers = ask(engine, [options] * 8)
    return answers, (np.array(engine.fairkv()["kept"]["tokens"]) - before).tolist()


def test_protected_tokens_are_kept(engine: Any) -> None:
    """A tenth at random has few of the answers; with their sentences protected it has all."""
    bare = right(ask(engine, [{"ratio": 0.1}] * 8))
    kept = right(ask(engine, [{"ratio": 0.1, "protect": [fact(i)]} for i in range(8)]))
    assert right(ask(engine, [{"compress": False}] * 8)) == 8
    assert bare <= 3 and kept >= 7, (bare, kept)


def test_what_is_counted(engine: Any) -> None:
    """Kept tokens of all prompts; the next plan is made from those with the server's budget."""

    def counted(options: Options) -> tuple[int, int]:
        before = engine.fairkv()
        ask(engine, [options] * 8)
        after = engine.fairkv()
        kept = np.array(after["kept"]["tokens"]) - np.array(before["kept"]["tokens"])
        recorded = after["traffic"]["count"] - before["traffic"]["count"]
        return int(kept.sum()) / kept.size / 8, recorded

    assert counted({"budget": 120}) == (120, 0)
    assert counted({"compress": False}) == (700, 0)
    assert counted({"ratio": 0.1}) == (70, 0)
    assert counted({"budget": 40, "protect": [[0, 100]]}) == (100 + 32 + 1, 0)
    assert counted({"protect": [[0, 100]]}) == (350, 8)
    assert counted(None) == (350, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scorer": "keydif"}, r"fairkv\.scorer: 'keydif' is not one of .*mean keydiff\?"),
        ({"budget": 32}, r"fairkv\.budget: 32 tokens are too few .* at least 33"),
        ({"ratio": 0}, r"fairkv\.ratio: 0\S* must be greater than 0"),
        ({"bugdet": 50}, r"no option 'bugdet': did you mean budget\?"),
        ({"protect": [[0, 901]]}, r"fairkv\.protect: \[0, 901\] is beyond the prompt"),
        # One of eight heads could win the budgets of all: 32 + 8 (127 - 32) < 800.
        ({"compress": False}, r"keep 900 of 900 tokens .* a budget of 127 at most"),
    ],
)
def test_a_wrong_request_harms_no_other(engine: Any, options: Options, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        ask(engine, [options], [TOKENS[0] + TOKENS[1][:200]])
    assert len(ask(engine, [None] * 8)) == 8

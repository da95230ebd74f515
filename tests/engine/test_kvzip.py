# SPDX-License-Identifier: Apache-2.0
"""Scorer ``kvzip``: prompts are repeated in passes of their own, once each, and nobody notices but
by the time that it takes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairkv_tests.plugin_folder import KEPT_PROBE, LINGER_PROBE, install_plugin
from fairkv_tests.workloads import CHECKS

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind everything else: kernels/ must not be found first

from demo.prompts import is_exact, make_prompts  # noqa: E402

MODEL = ROOT / "demo" / "model"
CHUNK, CHUNKS = 200, 4  # the second and third pass of a prompt have as many tokens
PROMPTS = make_prompts(seed=46_000, count=5, tokens=700, facts=4)
TOKENS = [prompt.token_ids for prompt in PROMPTS]
FAIRKV = {"scorer": "kvzip", "scope": "layer", "ratio": 0.25, "chunk": CHUNK}
ENGINE: dict[str, Any] = {
    "max_total_tokens": 16384,
    "chunked_prefill_size": 256,
    "environment": CHECKS,
}
Options = dict[str, Any]
# The last one is not repeated.
OPTIONS: list[Options] = [{}, {}, {}, {"ratio": 0.5}, {"budget": 120}, {"compress": False}]
ASKED = [PROMPTS[0], PROMPTS[1], *PROMPTS[1:]]
BATCH = [prompt.token_ids for prompt in ASKED]
REPEATED, TWIN = 4, 2  # prompts; which request has the prompt of the one before


def ask(engine: Any, prompts: list[list[int]], options: list[Options], **others: Any) -> list[Any]:
    """Results of prompts in one batch, each with its options."""
    sampling = [
        {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
        | {"custom_params": {"fairkv": each}}
        for each in options
    ]
    return list(engine.call("generate", input_ids=prompts, sampling_params=sampling, **others))


def answers(results: list[Any]) -> list[list[int]]:
    return [result["output_ids"] for result in results]


def passes(engine: Any) -> int:
    """The same on every rank."""
    (found,) = {json.dumps(rank["repeated"]) for rank in engine.fairkv()["ranks"]}
    return int(json.loads(found)["passes"])


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a server's ``PYTHONPATH`` names so that an abort comes in time."""
    return install_plugin(tmp_path_factory.mktemp("plugin"), "linger_probe", LINGER_PROBE)


@pytest.fixture
def engine(start_engine: Callable[..., Any], probe: Path) -> Any:
    """TP 2."""
    environment = {**CHECKS, "PYTHONPATH": str(probe)}
    return start_engine(MODEL, fairkv=FAIRKV, tp_size=2, **(ENGINE | {"environment": environment}))


def test_a_prompt_is_repeated_once_in_any_company(engine: Any) -> None:
    before = passes(engine)
    results = ask(engine, BATCH, OPTIONS)
    assert passes(engine) - before == REPEATED * CHUNKS
    assert answers(results)[1] == answers(results)[2]
    right = [is_exact(p, a) for p, a in zip(ASKED, answers(results), strict=True)]
    assert right[-1] and sum(right) >= 4
    for number, result in enumerate(results):
        assert result["meta_info"]["num_retractions"] == 0
        cached = result["meta_info"]["cached_tokens"]  # what others have read, not its own passes
        assert cached > 600 if number == TWIN else cached < 100
    again = ask(engine, BATCH[::-1], OPTIONS[::-1])  # from the prefix cache
    assert answers(again) == answers(results)[::-1]
    assert passes(engine) - before == REPEATED * CHUNKS
    engine.call("empty_cache")
    alone = [ask(engine, [p], [o])[0] for p, o in zip(BATCH, OPTIONS, strict=True)]
    assert answers(alone) == answers(results)
    assert passes(engine) - before == 2 * REPEATED * CHUNKS


def test_log_probabilities_are_the_prompts(engine: Any) -> None:
    engine.call("empty_cache")
    asked = {"return_logprob": True, "logprob_start_len": 0}
    found = [ask(engine, TOKENS[:1], [o], **asked)[0] for o in ({"compress": False}, {})]
    plain, repeated = (
        [pair[0] for pair in result["meta_info"]["input_token_logprobs"]] for result in found
    )
    assert len(plain) == len(repeated) == len(TOKENS[0])
    assert plain[1:] == pytest.approx(repeated[1:], abs=1e-4)


def test_aborted_while_it_is_repeated(engine: Any) -> None:
    """In its first pass, in a chunk of SGLang's, and the prompt is served as ever afterwards."""
    expected = answers(ask(engine, TOKENS[:1], [{}]))
    for sign in ("", "#cached-token: 700,"):  # the latter in its second pass
        engine.call("empty_cache")
        log = str(engine.log_file)
        ended = engine.call("abort_in_prefill", prompt=TOKENS[0], log=log, sign=sign)
        assert ended == "abort"
        assert {rank["requests"] for rank in engine.fairkv()["ranks"]} == {0}
    assert answers(ask(engine, TOKENS[:1], [{}])) == expected


def test_a_prompt_that_cannot_be_repeated_is_refused(engine: Any) -> None:
    long = (TOKENS[0] * 6)[:3900]  # of 4,096 positions
    with pytest.raises(RuntimeError, match="repeats prompts in chunks of 200 tokens; this one has"):
        ask(engine, [long], [{}])
    assert len(ask(engine, [long], [{"compress": False}])[0]["output_ids"]) == 6


VARIANTS: dict[str, Any] = {
    "one rank": {"tp_size": 1},
    "no overlap": {"tp_size": 2, "disable_overlap_schedule": True},
    "no prefix cache": {"tp_size": 2, "disable_radix_cache": True},
    "mixed chunks": {"tp_size": 2, "enable_mixed_chunk": True},
    "whole prompts": {"tp_size": 2, "chunked_prefill_size": 2048},
}


@pytest.mark.sweep  # an engine each
@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_and_kept_tokens_are_the_same(
    engine: Any, start_engine: Callable[..., Any], variant: str
) -> None:
    def served(one: Any) -> tuple[list[list[int]], Any]:
        before = one.fairkv()["kept"]["tokens"]
        found = answers(ask(one, BATCH, OPTIONS))
        after = one.fairkv()["kept"]["tokens"]
        return found, [
            [b - a for a, b in zip(*rows, strict=True)] for rows in zip(before, after, strict=True)
        ]

    engine.call("empty_cache")
    expected = served(engine)
    other = start_engine(MODEL, fairkv=FAIRKV, **{**ENGINE, **VARIANTS[variant]})
    found = served(other)
    assert passes(other) == REPEATED * CHUNKS
    other.close()
    assert found == expected


@pytest.mark.sweep
def test_a_small_pool_computes_again_what_it_has_lost(
    engine: Any, start_engine: Callable[..., Any]
) -> None:
    engine.call("empty_cache")
    expected = answers(ask(engine, BATCH, OPTIONS))
    fairkv = {**FAIRKV, "prefill_pool": 1400}
    small = start_engine(MODEL, fairkv=fairkv, tp_size=2, **ENGINE)
    assert answers(ask(small, BATCH, OPTIONS)) == expected
    small.close()


@pytest.mark.sweep
@pytest.mark.parametrize("tp_size", [1, 2])
def test_kept_sets_are_those_of_the_model_itself(
    start_engine: Callable[..., Any], tp_size: int, tmp_path: Path
) -> None:
    """Of transformers' model with passes of its own, which ``test_kvpress_kvzip.py`` compares with
    kvpress; nearly equal scores may change places.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fairkv_tests.kvpress_kvzip import kept_by_scorer

    probe = install_plugin(tmp_path / "plugin", "kept_probe", KEPT_PROBE)
    environment = {**CHECKS, "PYTHONPATH": str(probe)}
    fairkv = {**FAIRKV, "floor_alpha": 0.0, "window": 12}
    one = start_engine(
        MODEL, fairkv=fairkv, tp_size=tp_size, **{**ENGINE, "environment": environment}
    )
    ask(one, TOKENS[:1], [{}])
    found: list[set[tuple[int, int]]] = [set() for _ in range(4)]
    for line in re.findall(r"PROBE kept (.*)", one.log):
        layer, heads, rows = json.loads(line)
        found[layer] |= {(h, t) for h, row in zip(heads, rows, strict=True) for t in row}
    one.close()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    options = {"sink": 4, "chunk": CHUNK}
    expected = kept_by_scorer(model, tokenizer, torch.tensor(TOKENS[0]), 0.25, options)
    assert [len(layer) for layer in found] == [8 * 175] * 4
    differing = [len(a - b) for a, b in zip(found, expected, strict=True)]
    assert max(differing) <= 2, differing

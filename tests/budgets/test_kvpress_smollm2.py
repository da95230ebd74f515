# SPDX-License-Identifier: Apache-2.0
"""Kept sets of all methods are kvpress's on a real model, SmolLM2, and real text.

Real text has words twice, so scores tie but for rounding: a token may change places with another
whose score by kvpress is the same to 1 part in 10,000, as either order is right.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairkv_tests.kvpress_kvzip import kept_by_scorer, scores_and_kept_by_press
from fairkv_tests.kvpress_layers import CASES, WINDOW, kept_by_us, read

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind everything else: kernels/ must not be found first

from demo import smollm2  # noqa: E402

pytestmark = pytest.mark.slow
BUDGETS = (WINDOW + 10, 72, 145)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """Model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = smollm2.checkpoint()
    except RuntimeError as error:
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def text(loaded: tuple[Any, Any]) -> Tensor:
    """A chat's tokens up to 700 of them."""
    content = (ROOT / "LICENSE").read_text()
    message = {"role": "user", "content": content}
    ids = loaded[1].apply_chat_template([message], tokenize=True, return_dict=False)
    return torch.tensor(ids)[:700]


def check(kept: list[set[int]], wanted: Tensor, budget: int) -> int:
    """Tokens that differ, each of them a tie.

    Args:
        kept: By us, of each head.
        wanted: ``[H, N]`` kvpress's scores.
        budget: Tokens of a head.
    """
    wanted = wanted.clone()
    wanted[:, wanted.shape[1] - WINDOW :] = torch.inf
    different = 0
    for row, mine in zip(wanted, kept, strict=True):
        theirs = set(row.topk(budget).indices.tolist())
        least = row.topk(budget).values[-1]
        for token in mine ^ theirs:
            assert abs(row[token] - least) <= TOLERANCE * abs(least), (token, row[token], least)
        different += len(mine - theirs)
    return different


@pytest.mark.usefixtures("same_sketch")
@torch.no_grad()
def test_kept_sets(kvpress: Any, loaded: tuple[Any, Any], text: Tensor) -> None:
    """All layers; ``pytest -s`` says how many tokens changed places."""
    prompt = text[:290]
    lagkv = {"lag": 16, "sink": 3}
    cases = {**CASES, "lagkv": ("lagkv", lagkv, "LagKVPress", {"lag_size": 16, "n_sink": 3})}
    cases["streaming"] = ("streaming", {}, "StreamingLLMPress", {"compression_ratio": 0.0})
    layers = read(loaded[0], prompt)
    for case, (name, options, press, theirs) in cases.items():
        different = total = 0
        for layer in layers:
            for budget in BUDGETS:
                if case == "streaming":
                    theirs = {"compression_ratio": 1 - budget / len(prompt), "n_sink": 4}
                attention = layer.attention if case == "h2o" else None
                wanted = layer.score(getattr(kvpress, press)(**theirs), attention)
                kept = kept_by_us(layer.ours(name, **options)[1], budget, len(prompt))
                different += check(kept, wanted, budget)
                total += budget * len(kept)
        print(f"{case}: {different} of {total}")


@pytest.mark.usefixtures("same_sketch")
@torch.no_grad()
def test_kept_sets_of_compactor(kvpress: Any, loaded: tuple[Any, Any], text: Tensor) -> None:
    """Head by head and with full blocks, as on random models."""
    prompt = text[: 8 + 5 * 48 + WINDOW]
    options = {"sketch": 10, "attention_block": 48, "blending": 0.4}
    press = kvpress.CompactorPress(
        sink_size_end=WINDOW, chunk_size=48, sketch_dimension=10, blending=0.4
    )
    different = total = 0
    for layer in read(loaded[0], prompt):
        for i in range(layer.keys.shape[1]):
            head = layer.head(i)
            wanted = head.score(press)
            wanted[:, :8] = torch.inf
            for budget in BUDGETS:
                kept = kept_by_us(head.ours("compactor", **options)[1], budget, len(prompt))
                different += check(kept, wanted, budget)
                total += budget
    print(f"compactor: {different} of {total}")


@pytest.mark.parametrize(
    ("length", "chunk"), [(288, 2048), pytest.param(700, 300, marks=pytest.mark.sweep)]
)
def test_kept_sets_of_kvzip(
    kvpress: Any, loaded: tuple[Any, Any], text: Tensor, length: int, chunk: int
) -> None:
    """With its own chat template, whose beginning is not repeated; one chunk, and three."""
    model, tokenizer = loaded
    model.set_attn_implementation("sdpa")
    prompt, options = text[:length], {"sink": 4, "chunk": chunk}
    try:
        for ratio in (0.25, 0.5):
            scores, wanted = scores_and_kept_by_press(
                kvpress, model, tokenizer, prompt, ratio, options
            )
            kept = kept_by_scorer(model, tokenizer, prompt, ratio, options)
            different = 0
            for table, mine, theirs in zip(scores, kept, wanted, strict=True):
                assert len(mine) == len(theirs)
                least = min(float(table[place]) for place in theirs)
                for place in mine ^ theirs:
                    assert abs(float(table[place]) - least) <= TOLERANCE * least, (place, least)
                different += len(mine - theirs)
            print(f"kvzip {length} {chunk} {ratio}: {different} of {sum(map(len, kept))}")
    finally:
        model.set_attn_implementation("eager")

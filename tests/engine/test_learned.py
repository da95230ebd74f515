# SPDX-License-Identifier: Apache-2.0
"""Trained scorers in real engines: what is kept is what transformers' hidden states say, in chunks,
beside running requests, and where a prefix comes from the cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fairkv_sglang.budgets import BudgetSpec, make_scope, make_scorer, pick
from fairkv_sglang.budgets.scorers.per_head import ALWAYS
from fairkv_sglang.model import Model
from fairkv_tests.learned import write_weights
from fairkv_tests.plugin_folder import KEPT_PROBE, install_plugin
from fairkv_tests.workloads import CHECKS

MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"
SHAPE = Model.from_config(MODEL)
LAYERS, HEADS, WINDOW, RATIO, SHARED = 4, 8, 12, 0.25, 500
Kept = list[set[tuple[int, int]]]
"""Of each layer heads and positions."""


def prompts() -> list[list[int]]:
    """Three that have 500 tokens in common, of 700, 600 and 530."""
    make = torch.Generator().manual_seed(3)
    first = torch.randint(10, 490, (SHARED,), generator=make).tolist()
    return [
        first + torch.randint(10, 490, (n - SHARED,), generator=make).tolist()
        for n in (700, 600, 530)
    ]


@torch.no_grad()
def expected(scorer: Any, prompt: list[int]) -> Kept:
    """By the hidden states that transformers' attention gets; scope ``layer`` without a floor."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    hidden: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: hidden.append(kwargs["hidden_states"][0]), with_kwargs=True
        )
    model.model(input_ids=torch.tensor([prompt]))
    where = torch.float32, torch.device("cpu")
    gates = scorer.gates(SHAPE, range(LAYERS), range(HEADS), *where)
    scope = make_scope("layer", BudgetSpec(ratio=RATIO), LAYERS, HEADS, scorer, floor_alpha=0.0)
    kept, total = [], len(prompt)
    for layer, states in enumerate(hidden):
        scores = gates[layer](states).T[:, : total - WINDOW].contiguous()
        scores[:, : scorer.sink] = ALWAYS
        counts = scope.counts(layer, range(HEADS), scores, total)
        rows = pick(scores, counts, total).indices.tolist()
        kept.append({(head, t) for head, row in enumerate(rows) for t in row if t >= 0})
    return kept


def told(log: str) -> list[Kept]:
    """What the probe has said of each prompt, in the order in which they have ended; ranks tell of
    their own heads.
    """
    found: list[Kept] = []
    seen: dict[tuple[int, int], int] = {}  # layer and first head -> prompts so far
    for line in re.findall(r"PROBE kept (.*)", log):
        layer, heads, rows = json.loads(line)
        number = seen.get((layer, heads[0]), 0)
        seen[layer, heads[0]] = number + 1
        if number == len(found):
            found.append([set() for _ in range(LAYERS)])
        found[number][layer] |= {(h, t) for h, row in zip(heads, rows, strict=True) for t in row}
    return found


@pytest.mark.sweep  # an engine each; tests/attention compares kept sets with formulae in any pass
@pytest.mark.parametrize("scorer", ["kvzap", "fastkvzip"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_kept_sets_are_those_of_the_models_hidden_states(
    start_engine: Callable[..., Any], scorer: str, tp_size: int, tmp_path: Path
) -> None:
    """In chunks of 256 tokens, the second and third prompt with a prefix from the cache, and the
    third while the first is running; nearly equal scores may change places.
    """
    options = {
        "scorer_checkpoint": write_weights(tmp_path, scorer, SHAPE, seed=2),
        "window": WINDOW,
    }
    probe = install_plugin(tmp_path / "plugin", "kept_probe", KEPT_PROBE)
    engine = start_engine(
        MODEL,
        fairkv={
            "scorer": scorer, "scope": "layer", "ratio": RATIO, "floor_alpha": 0.0,
            **options, "scorer_checkpoint": str(options["scorer_checkpoint"]),
        },
        tp_size=tp_size,
        max_total_tokens=16384,
        chunked_prefill_size=256,
        enable_mixed_chunk=True,
        environment={**CHECKS, "PYTHONPATH": str(probe)},
    )  # fmt: skip
    asked = prompts()
    for prompt in asked[:2]:
        engine.generate([prompt], new_tokens=4)
    assert f"#cached-token: {SHARED}" in engine.log
    lines = len(engine.log)
    engine.call("empty_cache")
    engine.generate(asked, new_tokens=40)  # the others come while the first one runs
    found, again = told(engine.log[:lines]), told(engine.log[lines:])
    engine.close()
    made = make_scorer(scorer, **options)
    wanted = {len(kept[0]): kept for kept in (expected(made, prompt) for prompt in asked)}
    assert len(found) == 2 and {len(kept[0]) for kept in again} == wanted.keys()
    for kept in [*found, *again]:
        right = wanted[len(kept[0])]
        assert [len(layer) for layer in kept] == [len(layer) for layer in right]
        differing = [len(a - b) for a, b in zip(kept, right, strict=True)]
        assert max(differing) <= 2, differing

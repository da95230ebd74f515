# SPDX-License-Identifier: Apache-2.0
"""Model of `bench/replan.py`: heads keep what a table says, other heads on other prompts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fairkv_sglang.budgets import BudgetSpec, make_scope, make_scorer
from fairkv_sglang.placement import make_plan

FILE = Path(__file__).resolve().parents[2] / "bench" / "replan_model.py"
FLOOR = 0.2  # what every head has of a layer's budget, FairKV's default


@pytest.fixture(scope="module")
def model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("replan_model", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_heads_keep_their_share_on_each_task(model: ModuleType) -> None:
    target, shape = model.targets(None), model.SHAPE
    weights = model.random_weights()
    scales = model.calibrate(weights, target)
    beyond = model.RATIO * model.PROMPT - model.WINDOW
    expected = model.WINDOW + beyond * (FLOOR + (1 - FLOOR) * target)
    scorer = make_scorer("snapkv", window=model.WINDOW)
    spec = BudgetSpec(ratio=model.RATIO)
    scope = make_scope("layer", spec, shape.layers, shape.kv_heads, scorer, floor_alpha=FLOOR)
    for task in range(len(model.TASKS)):
        kept = np.zeros((shape.layers, shape.kv_heads))
        for noise in model.read_noise(weights, task, samples=8):
            for layer, scores in enumerate(model.scores(noise, scales[task])):
                heads, score = range(shape.kv_heads), torch.from_numpy(scores)
                kept[layer] += scope.counts(layer, heads, score, model.PROMPT).numpy() / 8
        assert np.abs(kept - expected[task]).sum() < 0.05 * kept.sum()
    # A plan that was made for one task is bad for the other.
    shares = make_plan("fair_copying", expected[0], 2, max_lanes=5).shares()
    loads = np.einsum("lrh,tlh->tlr", shares, expected)
    imbalance = loads.max(axis=2).sum(axis=1) / loads.mean(axis=2).sum(axis=1)
    assert imbalance[0] < 1.02 and imbalance[1] > 1.1


def test_a_task_has_its_own_half_of_the_vocabulary(model: ModuleType) -> None:
    a, b = (np.array(model.prompts(task, 3, seed=1)) for task in model.TASKS)
    assert a.max() < model.SHAPE.vocab // 2 <= b.min()
    assert model.prompts("A", 3, seed=1) == a.tolist()


def test_a_head_that_would_keep_more_than_its_prompt_is_refused(model: ModuleType) -> None:
    target = np.zeros((2, model.SHAPE.layers, model.SHAPE.kv_heads))
    target[:, :, 0] = model.SHAPE.kv_heads / model.RATIO
    with pytest.raises(ValueError, match="cannot keep"):
        model.calibrate(model.random_weights(), target)

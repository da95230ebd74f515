# SPDX-License-Identifier: Apache-2.0
"""Model of `bench/replan.py`: heads keep what a table says, other heads on other prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fairkv_sglang.bench import replan_model
from fairkv_sglang.budgets import BudgetSpec, make_scope, make_scorer
from fairkv_sglang.placement import make_plan


def test_heads_keep_their_share_on_each_task() -> None:
    target, shape = replan_model.targets(None), replan_model.SHAPE
    weights = replan_model.random_weights()
    scales = replan_model.calibrate(weights, target)
    beyond = replan_model.RATIO * replan_model.PROMPT - replan_model.WINDOW
    # The window is more than the floor, so that heads get what they win and nothing else.
    expected = replan_model.WINDOW + beyond * target
    scorer = make_scorer("snapkv", window=replan_model.WINDOW)
    spec = BudgetSpec(ratio=replan_model.RATIO)
    scope = make_scope("layer", spec, shape.num_layers, shape.num_kv_heads, scorer)
    assert scope.floor(replan_model.PROMPT) == 0
    for task in range(len(replan_model.TASKS)):
        kept = np.zeros((shape.num_layers, shape.num_kv_heads))
        for noise in replan_model.read_noise(weights, task, samples=8):
            for layer, scores in enumerate(replan_model.scores(noise, scales[task])):
                heads, score = range(shape.num_kv_heads), torch.from_numpy(scores)
                kept[layer] += scope.counts(layer, heads, score, replan_model.PROMPT).numpy() / 8
        assert np.abs(kept - expected[task]).sum() < 0.05 * kept.sum()
    # A plan that was made for one task is bad for the other.
    shares = make_plan("fair_copying", expected[0], 2, max_lanes=5).shares()
    loads = np.einsum("lrh,tlh->tlr", shares, expected)
    imbalance = loads.max(axis=2).sum(axis=1) / loads.mean(axis=2).sum(axis=1)
    assert imbalance[0] < 1.02 and imbalance[1] > 1.1


def test_a_task_has_its_own_half_of_the_vocabulary() -> None:
    a, b = (np.array(replan_model.prompts(task, 3, seed=1)) for task in replan_model.TASKS)
    assert a.max() < replan_model.SHAPE.vocab_size // 2 <= b.min()
    assert replan_model.prompts("A", 3, seed=1) == a.tolist()


def test_a_head_that_would_keep_more_than_its_prompt_is_refused() -> None:
    target = np.zeros((2, replan_model.SHAPE.num_layers, replan_model.SHAPE.num_kv_heads))
    target[:, :, 0] = replan_model.SHAPE.num_kv_heads / replan_model.RATIO
    with pytest.raises(ValueError, match="cannot keep"):
        replan_model.calibrate(replan_model.random_weights(), target)

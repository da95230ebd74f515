# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fairkv_sglang.bench.checkpoint import build
from fairkv_sglang.bench.flags import MODELS
from fairkv_sglang.model import Model

SMALL = Model("small,x", 2, 6, 2, 8, 16, 32, 64, context=128)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_the_checkpoint_is_the_model(architecture: str, tmp_path: Path) -> None:
    model = replace(SMALL, architecture=architecture)
    path = build(model, tmp_path, torch.bfloat16)
    found = Model.from_config(path)
    assert replace(found, name=model.name) == model
    norms = 4 if architecture == "Qwen3ForCausalLM" else 2
    with safe_open(path / "model.safetensors", framework="pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert file.get_tensor("lm_head.weight").dtype == torch.bfloat16
    assert len(shapes) == 3 + 2 * (7 + norms)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == [48, 16]
    assert shapes["model.layers.1.self_attn.v_proj.weight"] == [16, 16]
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == [16, 48]
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_existing_checkpoint_is_reused_and_models_do_not_collide(tmp_path: Path) -> None:
    path = build(SMALL, tmp_path)
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert build(SMALL, tmp_path) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    assert build(replace(SMALL, num_layers=1), tmp_path) != path


def test_presets_have_the_published_sizes() -> None:
    model = MODELS["llama-3.3-70b"]
    heads = 2 * (model.num_q_heads + model.num_kv_heads)
    layer = model.hidden_size * (model.head_dim * heads + 3 * model.intermediate_size)
    total = model.num_layers * layer + 2 * model.vocab_size * model.hidden_size
    assert total == pytest.approx(70.55e9, rel=0.001)

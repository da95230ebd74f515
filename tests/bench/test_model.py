# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from fairkv_sglang.bench.model import BenchModel, build, parse_model


def test_shape_from_a_flag() -> None:
    assert parse_model("") == BenchModel()
    assert parse_model("layers=2, head_dim=64").model_dump(include={"layers", "head_dim"}) == {
        "layers": 2,
        "head_dim": 64,
    }
    for text, message in (
        ("layer=2", "'layer'"),
        ("layers=x", "layers"),
        ("layers=0", "layers"),
        ("group", "group"),
    ):
        with pytest.raises(ValueError, match=f"--model: .*{message}"):
            parse_model(text)


def test_the_checkpoint_has_the_shapes_that_its_config_says(tmp_path: Path) -> None:
    shape = BenchModel(layers=2, kv_heads=2, group=3, head_dim=8, hidden=16, vocab=64)
    path = build(shape, tmp_path)
    config = json.loads((path / "config.json").read_text())
    assert config["num_attention_heads"] == 6
    with safe_open(path / "model.safetensors", framework="pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert len(shapes) == 3 + 2 * 9
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == [48, 16]
    assert shapes["model.layers.1.self_attn.v_proj.weight"] == [16, 16]
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == [16, 48]


def test_an_existing_checkpoint_is_reused_and_shapes_do_not_collide(tmp_path: Path) -> None:
    shape = BenchModel(layers=1, hidden=16, intermediate=16, vocab=64)
    path = build(shape, tmp_path)
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert build(shape, tmp_path) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    assert shape.name != shape.model_copy(update={"seed": 1}).name

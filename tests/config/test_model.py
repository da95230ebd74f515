# SPDX-License-Identifier: Apache-2.0
"""The description of a model, from each of its sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fairkv_sglang.model import PRESETS, Model, Sliding
from fairkv_sglang.placement import CostModel

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def config(tmp_path: Path, **changes: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return tmp_path


def test_from_a_config(tmp_path: Path) -> None:
    folder = config(tmp_path)
    assert Model.from_config(folder) == Model(
        str(folder), 32, 32, 8, 128, 4096, 14336, 128256, context=131072
    )
    assert Model.from_config(folder).group_size == 4
    assert Model.from_config(config(tmp_path, head_dim=64)).head_dim == 64
    assert Model.from_config(config(tmp_path, num_key_value_heads=None)).group_size == 1
    assert Model.from_config(config(tmp_path, moe_intermediate_size=768)).intermediate_size == 768
    nested = config(tmp_path, num_attention_heads=None, text_config=LLAMA)
    assert Model.from_config(nested / "config.json").num_kv_heads == 8


@pytest.mark.parametrize(("dtype", "width"), [("auto", 2), ("bfloat16", 2), ("float32", 4)])
def test_width_is_that_of_the_servers_dtype(tmp_path: Path, dtype: str, width: int) -> None:
    path = config(tmp_path, torch_dtype="float32")
    assert Model.from_config(path, dtype).dtype_bytes == width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size are needed"),
        ({"num_key_value_heads": 5}, "32 query heads are no multiple of 5 KV heads"),
    ],
)
def test_bad_config(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model.from_config(config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "sliding"),
    [
        ({}, Sliding(512, (0, 1, 2, 3, 4))),  # Gemma 3's pattern: the sixth layer has none
        ({"sliding_window_pattern": 3}, Sliding(512, (0, 1, 3, 4))),
        ({"layer_types": ["full_attention", "sliding_attention"] * 3}, Sliding(512, (1, 3, 5))),
        ({"max_position_embeddings": 512}, None),  # full attention
        ({"layer_types": ["full_attention"] * 6}, None),
        (
            {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"},
            Sliding(512, (0, 2, 4)),
        ),
    ],
)
def test_layers_with_a_sliding_window(
    tmp_path: Path, changes: dict[str, Any], sliding: Sliding | None
) -> None:
    """As SGLang reads a configuration, and as ``fairkv plan`` does without SGLang."""
    from sglang.srt.configs.model_config import ModelConfig

    gemma = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window": 512,
        "num_hidden_layers": 6,
        "head_dim": 64,
        "dtype": "bfloat16",
    }
    folder = config(tmp_path, **{**gemma, **changes})
    model = Model.from_sglang(ModelConfig(str(folder)))
    assert model.sliding == sliding == Model.from_config(folder).sliding
    assert model.sinks == ("architectures" in changes)
    assert model.ring == (512 if sliding else 0)


def test_what_a_sliding_window_keeps() -> None:
    sliding = Sliding(4, (0, 2))
    assert [sliding.kept(n) for n in (1, 3, 4, 100)] == [1, 3, 3, 3]
    assert sliding.mask(3).tolist() == [True, False, True]
    assert sliding.most(3)[[0, 2], 0].tolist() == [4, 4] and sliding.most(3)[1, 0] > 1 << 30


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read model config"):
        Model.from_config(tmp_path / "no.json")


def test_presets() -> None:
    assert {(m.num_q_heads % m.num_kv_heads, m.name) for m in PRESETS.values()} == {
        (0, name) for name in PRESETS
    }
    qwen = PRESETS["qwen3-0.6b"]
    assert (qwen.num_layers, qwen.group_size, qwen.num_q_heads * qwen.head_dim) == (28, 2, 2048)


def test_cost_models_default_is_llama_3_8b() -> None:
    model = PRESETS["llama-3.1-8b"]
    assert CostModel() == CostModel(
        head_dim=model.head_dim, hidden_size=model.hidden_size, group=model.group_size
    )

# SPDX-License-Identifier: Apache-2.0
"""The list of refusals: every row fires on its setting and stays quiet on SGLang's defaults."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from fairkv_sglang.config import ConfigError, FairKVConfig
from fairkv_sglang.model import Model
from fairkv_sglang.support import REFUSALS, Refusal, check_split, check_start, refuse, table

LLAMA = Model(
    name="tiny",
    num_layers=2,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=32,
    hidden_size=128,
    intermediate_size=256,
)

# One setting that triggers each row, by the row's feature.
TRIGGERS: dict[str, tuple[dict[str, object], Model | None]] = {
    "another device": ({"device": "xpu"}, None),
    "speculative decoding": ({"speculative_algorithm": "EAGLE"}, None),
    "prefill-decode disaggregation": ({"disaggregation_mode": "decode"}, None),
    "a decode pool with role switch": ({"enable_pd_role_switch": True}, None),
    "PD multiplexing": ({"enable_pdmux": True}, None),
    "encoder disaggregation": ({"language_only": True}, None),
    "a hierarchical cache": ({"enable_hierarchical_cache": True}, None),
    "LMCache": ({"enable_lmcache": True}, None),
    "FlexKV": ({"enable_flexkv": True}, None),
    "an external cache linker": ({"enable_unified_cache_external_linker": True}, None),
    "HiSparse": ({"enable_hisparse": True}, None),
    "another radix cache": ({"radix_cache_backend": "flexkv"}, None),
    "another decode attention": ({"decode_attention_backend": "flashinfer"}, None),
    "another KV layout": ({"enable_unified_memory": True}, None),
    "SGLang's HND layout": ({}, None),
    "a prefill without KV cache": ({"prefill_only_disable_kv_cache": True}, None),
    "the KV canary": ({"kv_canary": "log"}, None),
    "pipeline parallelism": ({"pp_size": 2}, None),
    "data parallelism": ({"dp_size": 2}, None),
    "data-parallel attention": ({"enable_dp_attention": True}, None),
    "context parallelism": ({"dcp_size": 2}, None),
    "several nodes": ({"nnodes": 2}, None),
    "overlapped half batches": ({"enable_two_batch_overlap": True}, None),
    "LoRA": ({"lora_paths": ["a"]}, None),
    "a quantised KV cache": ({"kv_cache_dtype": "fp8_e4m3"}, None),
    "quantised weights": ({}, replace(LLAMA, quantization="awq")),
    "weights that load behind the start": ({"startup_weight_load_mode": "overlap"}, None),
    "weights on the CPU": ({"cpu_offload_gb": 4}, None),
    "CUDA graphs in prefill": ({"cuda_graph_backend_prefill": "breakable"}, None),
    "kernels that run a whole model": ({"enable_nvidia_megakernel": True}, None),
    "a KV cache that ranks share": ({"enable_kv_cache_sharding": True}, None),
    "torch.compile": ({"enable_torch_compile": True}, None),
    "deterministic inference": ({"enable_deterministic_inference": True}, None),
    "diffusion language models": ({"dllm_algorithm": "LowConfidence"}, None),
    "multi-item scoring": ({"enable_mis": True}, None),
    "routed experts or indexer output": ({"enable_return_routed_experts": True}, None),
    "streaming sessions": ({"enable_streaming_session": True}, None),
    "Ray": ({"use_ray": True}, None),
    "a memory saver": ({"enable_memory_saver": True}, None),
    "other model implementations": ({"model_impl": "transformers"}, None),
    "embedding and reward models": ({"is_embedding": True}, None),
    "multimodal models": ({}, replace(LLAMA, multimodal=True)),
    "encoder-decoder models": ({}, replace(LLAMA, encoder_decoder=True)),
    "MLA and state-space models": ({}, replace(LLAMA, attention="MLA")),
    "sliding-window attention": ({}, replace(LLAMA, sliding_window=512)),
    "this architecture": ({}, replace(LLAMA, architecture="GemmaForCausalLM")),
}

NEWER = {
    "kernels that run a whole model": {"enable_nvidia_megakernel", "enable_amd_monokernel"},
    "a KV cache that ranks share": {"enable_kv_cache_sharding"},
}
"""Fields that SGLang has had since a later release than the oldest supported one."""


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.feature)
def test_each_row_is_reported_by_name(row: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row's own message comes out, in one line that says what to do."""
    settings, model = TRIGGERS[row.feature]
    if row.setting.startswith("SGLANG_"):
        monkeypatch.setenv(row.setting, "1")
    with pytest.raises(ConfigError) as caught:
        refuse(SimpleNamespace(**settings), model)
    assert str(caught.value) == row.message
    assert row.feature in row.message and row.setting in row.message and row.instead in row.message
    assert "\n" not in row.message


def test_defaults_of_sglang_pass() -> None:
    """Nothing is refused that the user has not asked for, and no row reads a misspelt field."""
    msgspec = pytest.importorskip("msgspec")
    server_args = pytest.importorskip("sglang.srt.server_args")
    arguments = server_args.ServerArgs(model_path="dummy")
    refuse(arguments, LLAMA)
    fields = {field.name for field in msgspec.structs.fields(server_args.ServerArgs)}
    for feature, (settings, _) in TRIGGERS.items():
        assert set(settings) <= fields | NEWER.get(feature, set())
    for row in REFUSALS:
        assert row.refused is not None or (row.fields and set(row.fields) <= fields)


def test_full_window_passes() -> None:
    """A window that the context never reaches is full attention."""
    refuse(SimpleNamespace(), replace(LLAMA, sliding_window=4096, context=4096))


@pytest.mark.parametrize(
    ("model", "tp_size", "right"),
    [
        (LLAMA, 3, "1 or 2 or 4 or 8"),
        (LLAMA, 0, "1 or 2 or 4 or 8"),
        (replace(LLAMA, num_kv_heads=6, num_q_heads=12), 4, "1 or 2"),
        (replace(LLAMA, intermediate_size=250), 4, "1 or 2"),
    ],
)
def test_split_that_does_not_divide_names_those_that_do(
    model: Model, tp_size: int, right: str
) -> None:
    """The message lists the TP sizes that work."""
    with pytest.raises(ConfigError, match=f"--tp-size {tp_size}.*use {right}$"):
        check_split(model, tp_size)


def test_fewer_kv_heads_than_ranks_pass() -> None:
    """SGLang copies KV heads when the rank count is a multiple."""
    check_split(replace(LLAMA, num_kv_heads=2), 4)


def test_table_has_a_row_for_each() -> None:
    """The table of docs/support.md is made from the list."""
    assert len(table().splitlines()) == len(REFUSALS) + 2


def test_a_decode_backend_of_another_device_is_refused_before_weights() -> None:
    config = FairKVConfig(enabled=True, decode_backend="flashinfer")
    with pytest.raises(ConfigError, match="flashinfer does not run on cpu: use auto or one of num"):
        check_start(config, LLAMA, 2, "cpu")
    assert check_start(FairKVConfig(enabled=True), LLAMA, 2, "cpu").plan.tp_size == 2


@pytest.mark.parametrize("options", [{"scorer": "compactor"}, {"group": "max"}])
def test_a_scorer_that_needs_a_whole_group_is_refused_on_parts(options: dict[str, str]) -> None:
    """Eight ranks have one query head each, two for every KV head."""
    config = FairKVConfig(enabled=True, **options)
    with pytest.raises(ConfigError, match="8 ranks share 4 KV heads: use at most 4 ranks"):
        check_start(config, LLAMA, 8, "cpu")
    check_start(config, LLAMA, 4, "cpu")
    check_start(FairKVConfig(enabled=True), LLAMA, 8, "cpu")

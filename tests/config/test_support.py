# SPDX-License-Identifier: Apache-2.0
"""The list of refusals: every row fires on its setting and stays quiet on SGLang's defaults."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from fairkv_sglang.config import ConfigError, FairKVConfig
from fairkv_sglang.decode_backends import DECODE_BACKENDS, DecodeBackend
from fairkv_sglang.model import Model, Sliding
from fairkv_sglang.refusals import REFUSALS, Refusal
from fairkv_sglang.support import (
    check_disaggregated,
    check_split,
    check_start,
    refuse,
    table,
)

LLAMA = Model(
    name="tiny",
    num_layers=2,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=32,
    hidden_size=128,
    intermediate_size=256,
)


def quantised(method: str, **config: object) -> Model:
    """A model with heads of 64 in groups of 2, of a quantised checkpoint."""
    return replace(LLAMA, head_dim=64, quantization=method, quantization_config=config)


# One setting that triggers each row, by the row's feature.
TRIGGERS: dict[str, tuple[dict[str, object], Model | None]] = {
    "another device": ({"device": "xpu"}, None),
    "speculative decoding (EAGLE, MTP, NGRAM and all others)": (
        {"speculative_algorithm": "NGRAM"},
        None,
    ),
    "a transfer backend of SGLang's in prefill-decode disaggregation": (
        {"disaggregation_mode": "decode", "disaggregation_transfer_backend": "nixl"},
        None,
    ),
    "prefill-decode disaggregation of replicas or over several nodes": (
        {
            "disaggregation_mode": "prefill",
            "disaggregation_transfer_backend": "fairkv",
            "dp_size": 2,
        },
        None,
    ),
    "what keeps, checks or moves whole prompts on a decode server": (
        {"disaggregation_decode_enable_radix_cache": True},
        None,
    ),
    "a copy of requests that a decode server retracts": (
        {"disaggregation_decode_retraction_backup": "cpu_tensor"},
        None,
    ),
    "prefill before its decode server is known": ({"optimistic_prefill_attempts": 1}, None),
    "a server that switches between prefill and decode": ({"enable_pd_role_switch": True}, None),
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
    "SGLang's Rust server": ({}, None),
    "a prefill without KV cache": ({"prefill_only_disable_kv_cache": True}, None),
    "the KV canary": ({"kv_canary": "log"}, None),
    "pipeline parallelism": ({"pp_size": 2}, None),
    "data parallelism over several nodes": ({"dp_size": 2, "nnodes": 2}, None),
    "data-parallel attention": ({"enable_dp_attention": True}, None),
    "expert parallelism": ({"ep_size": 2}, None),
    "context parallelism": ({"dcp_size": 2}, None),
    "several nodes without an address where they meet": ({"nnodes": 2}, None),
    "ranks that the nodes do not divide": (
        {"nnodes": 2, "dist_init_addr": "node0:5000", "tp_size": 3},
        None,
    ),
    "several tokenizer processes": ({"tokenizer_worker_num": 2}, None),
    "overlapped half batches": ({"enable_two_batch_overlap": True}, None),
    "LoRA": ({"lora_paths": ["a"]}, None),
    "a quantised KV cache": ({"kv_cache_dtype": "fp8_e4m3"}, None),
    "a KV cache of another type than the model": (
        {"kv_cache_dtype": "bf16"},
        replace(LLAMA, dtype="float32"),
    ),
    "a KV cache that the checkpoint quantises": (
        {"kv_cache_dtype": "auto"},
        quantised("fp8", kv_cache_quant_algo="FP8"),
    ),
    "weights that are quantised while they are loaded": ({}, replace(LLAMA, quantization="fp8")),
    "quantised weights of this kind": ({}, quantised("modelopt_fp4", quant_algo="NVFP4")),
    "AWQ or GPTQ weights with act-order or without groups": (
        {},
        quantised("gptq_marlin", group_size=64, desc_act=True),
    ),
    "quantised blocks or groups that do not divide a head": (
        {},
        quantised("fp8", weight_block_size=[128, 128]),
    ),
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
    "multi-head latent attention (MLA: DeepSeek V2 and V3, Kimi K2, MiniCPM3)": (
        {},
        replace(LLAMA, attention="MLA"),
    ),
    "state-space models (Mamba)": ({}, replace(LLAMA, attention="SSM")),
    "hybrids of attention and linear or state-space layers (Qwen3-Next, Qwen3.5, Nemotron-H)": (
        {},
        replace(LLAMA, hybrid=True),
    ),
    "sliding-window attention (Gemma 2)": ({}, replace(LLAMA, sliding_window=512)),
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


def test_nodes_and_replicas_pass() -> None:
    refuse(SimpleNamespace(nnodes=2, tp_size=4, dist_init_addr="[fe80::1]:5000"), LLAMA)
    refuse(SimpleNamespace(dp_size=2, tp_size=2), LLAMA)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_kept_rows_between_servers_pass(mode: str) -> None:
    """With what SGLang and FairKV settle for such a server."""
    refuse(
        SimpleNamespace(
            disaggregation_mode=mode,
            disaggregation_transfer_backend="fairkv",
            disaggregation_decode_extra_slots=0,
            disaggregation_decode_retraction_backup="none" if mode == "decode" else None,
            optimistic_prefill_attempts=0,
        )
    )


def test_full_window_passes() -> None:
    """A window that the context never reaches is full attention."""
    refuse(SimpleNamespace(), replace(LLAMA, sliding_window=4096, context=4096))


@pytest.mark.parametrize("name", [None, "auto", "bf16", "bfloat16"])
def test_a_kv_cache_of_the_models_own_type_passes(name: str | None) -> None:
    refuse(SimpleNamespace(kv_cache_dtype=name), replace(LLAMA, dtype="bfloat16"))


SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
LATENT = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
QWEN = {"text_config": {**SIZES, "model_type": "qwen3_5_text"}, "vision_config": {}}
STATES = {"num_heads": 8, "head_dim": 64, "state_size": 16}


@pytest.mark.parametrize(
    ("architecture", "kind", "config", "refused"),
    [
        ("DeepseekV2ForCausalLM", "deepseek_v2", LATENT, "MLA: DeepSeek"),
        ("Mamba2ForCausalLM", "mamba2", STATES, "state-space models"),
        ("Qwen3NextForCausalLM", "qwen3_next", {}, "hybrids of attention"),
        ("Qwen3_5ForCausalLM", "qwen3_5_text", {}, "hybrids of attention"),
        ("Qwen3_5ForConditionalGeneration", "qwen3_5", QWEN, "multimodal models"),
        ("JambaForCausalLM", "jamba", {}, "hybrids of attention"),
        ("NemotronHForCausalLM", "nemotron_h", {"hybrid_override_pattern": "M*M-"}, "hybrids"),
        ("Gemma2ForCausalLM", "gemma2", {"sliding_window": 4096}, "sliding-window attention"),
        (
            "Gemma3ForCausalLM",
            "gemma3_text",
            {"sliding_window": 512, "num_hidden_layers": 6},  # the sixth has no window
            None,
        ),
        ("GptOssForCausalLM", "gpt_oss", {"sliding_window": 128}, None),
        ("MistralForCausalLM", "mistral", {"sliding_window": 4096}, "sliding-window attention"),
        ("GemmaForCausalLM", "gemma", {}, "this architecture"),
        ("Qwen2ForCausalLM", "qwen2", {"sliding_window": 512, "use_sliding_window": False}, None),
        ("Qwen3MoeForCausalLM", "qwen3_moe", {"num_experts": 4}, None),
        ("MixtralForCausalLM", "mixtral", {}, None),
        ("Phi3ForCausalLM", "phi3", {"sliding_window": 262144}, None),
    ],
)
def test_models_by_their_configurations(
    tmp_path: Path, architecture: str, kind: str, config: dict[str, object], refused: str | None
) -> None:
    """As SGLang reads them, with the keys of the published ones; no weights are there."""
    from sglang.srt.configs.model_config import ModelConfig

    config = {"architectures": [architecture], "model_type": kind, **SIZES, **config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = Model.from_sglang(ModelConfig(str(tmp_path)))
    if refused is None:
        refuse(SimpleNamespace(), model)
        return
    with pytest.raises(ConfigError, match=refused):
        refuse(SimpleNamespace(), model)


CHANNELS = {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}
TENSOR = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False}
INTEGERS = {"weights": {"type": "int", "num_bits": 4, "strategy": "group"}}
BLOCKS = {**CHANNELS["weights"], "strategy": "block", "block_structure": [128, 128]}


@pytest.mark.parametrize(
    ("model", "tp_size", "refused"),
    [
        (quantised("fp8", activation_scheme="static"), 1, None),
        (quantised("fp8", weight_block_size=[64, 128]), 4, None),
        (quantised("fp8", weight_block_size=[64, 128]), 8, "that do not divide a head"),
        (quantised("compressed-tensors", config_groups={"0": CHANNELS}), 8, None),
        (quantised("mxfp4", modules_to_not_convert=["model.layers.*.self_attn"]), 8, None),
        (quantised("mxfp4", modules_to_not_convert=["lm_head"]), 8, "of this kind"),
        (quantised("compressed-tensors", config_groups={"0": INTEGERS}), 1, "of this kind"),
        (
            quantised("compressed-tensors", config_groups={"0": CHANNELS}, kv_cache_scheme=TENSOR),
            1,
            "that the checkpoint quantises",
        ),
        (
            quantised("compressed-tensors", config_groups={"0": CHANNELS}, kv_cache_scheme=None),
            1,
            None,
        ),
        (
            quantised(
                "compressed-tensors", config_groups={"0": CHANNELS, "1": {"weights": BLOCKS}}
            ),
            1,
            "that do not divide a head",
        ),
        (quantised("awq_marlin", bits=4, group_size=64), 4, None),
        (quantised("awq_marlin", bits=4, group_size=128), 4, "that do not divide a head"),
        (quantised("awq", bits=4, group_size=64), 1, "of this kind"),
        (quantised("gptq_marlin", bits=4, group_size=32, desc_act=False), 8, None),
        (quantised("gptq_marlin", bits=4, group_size=-1), 1, "act-order or without groups"),
    ],
    ids=lambda value: value.quantization if isinstance(value, Model) else str(value),
)
def test_formats_that_can_be_cut_along_heads(
    model: Model, tp_size: int, refused: str | None
) -> None:
    """With 4 KV heads, a rank of 8 has one of the two query heads of a KV head."""
    if refused is None:
        refuse(SimpleNamespace(tp_size=tp_size), model)
        return
    with pytest.raises(ConfigError, match=refused):
        refuse(SimpleNamespace(tp_size=tp_size), model)


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


@pytest.mark.parametrize(
    "options", [{"scorer": "compactor"}, {"scorer": "kvzip"}, {"group": "max"}]
)
def test_a_scorer_that_needs_a_whole_group_is_refused_on_parts(options: dict[str, str]) -> None:
    """Eight ranks have one query head each, two for every KV head."""
    config = FairKVConfig(enabled=True, **options)
    with pytest.raises(ConfigError, match="8 ranks share 4 KV heads: use at most 4 ranks"):
        check_start(config, LLAMA, 8, "cpu")
    check_start(config, LLAMA, 4, "cpu")
    check_start(FairKVConfig(enabled=True), LLAMA, 8, "cpu")


def test_outputs_are_not_compressed_beside_sliding_windows() -> None:
    config = FairKVConfig(enabled=True, budget=64, decode_compression=True)
    check_start(config, LLAMA, 2, "cpu")
    with pytest.raises(ConfigError, match="sliding windows are not compressed: leave --fairkv-dec"):
        check_start(config, replace(LLAMA, sliding=Sliding(16, (0,))), 2, "cpu")


@pytest.mark.parametrize(
    ("options", "sliding", "words"),
    [
        ({"scorer": "kvzip"}, None, "scorer kvzip"),
        ({"budget": 64, "decode_compression": True}, None, "leave --fairkv-decode-compression out"),
        ({}, Sliding(16, (0,)), "a model with sliding windows"),
    ],
)
def test_what_was_not_tried_on_two_servers_is_refused(
    options: dict[str, Any], sliding: Sliding | None, words: str
) -> None:
    check_disaggregated(FairKVConfig(enabled=True), LLAMA)
    with pytest.raises(ConfigError, match=f"--disaggregation-mode with .*{words}"):
        check_disaggregated(FairKVConfig(enabled=True, **options), replace(LLAMA, sliding=sliding))


@pytest.mark.parametrize("factory", ["", "no_such_package.decode:make", "json", "json.no:make"])
def test_a_decode_backend_that_nothing_can_make_is_refused_before_weights(
    factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of another package, whose rank would find out after the weights."""

    @dataclass(frozen=True)
    class Theirs(DecodeBackend):
        name: ClassVar[str] = "theirs"
        summary: ClassVar[str] = "of another package"
        devices: ClassVar[tuple[str, ...]] = ("cpu",)

    Theirs.factory = factory
    for kind in ("_classes", "_models"):
        monkeypatch.setattr(DECODE_BACKENDS, kind, dict(getattr(DECODE_BACKENDS, kind)))
    DECODE_BACKENDS.register(Theirs)
    config = FairKVConfig(enabled=True, decode_backend="theirs")
    with pytest.raises(ConfigError, match=r"decode backend 'theirs' has the factory .*module:func"):
        check_start(config, LLAMA, 2, "cpu")
    Theirs.factory = "json:loads"
    check_start(config, LLAMA, 2, "cpu")

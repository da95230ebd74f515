# SPDX-License-Identifier: Apache-2.0
"""What FairKV refuses: one list, from which the start-up check, the README's table and a test are
made.

Everything here runs in the parent process, before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fairkv_sglang.config import ConfigError, FairKVConfig
from fairkv_sglang.model_facts import ModelFacts
from fairkv_sglang.placement import Plan
from fairkv_sglang.planning import make_budgets, make_placement

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""Architectures whose attention has decode twins (``patches/models.py``)."""


@dataclass(frozen=True)
class Refusal:
    """One thing that FairKV cannot be combined with.

    Attributes:
        feature: Its name, for people.
        setting: The flag, environment or model property that turns it on.
        refused: Predicate on SGLang's server arguments (any object with its field names, missing
            ones read as None) and the model, which is None until its configuration has been read.
        instead: What the user can do.
    """

    feature: str
    setting: str
    refused: Callable[[Any, ModelFacts | None], bool]
    instead: str

    @property
    def message(self) -> str:
        """The line that the user sees."""
        return f"FairKV cannot be combined with {self.feature} ({self.setting}): {self.instead}"


class _Lenient:
    """Reads fields of server arguments; a field that this SGLang does not have is None."""

    def __init__(self, arguments: Any) -> None:
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arguments, name, None)


def _on(*names: str) -> Callable[[Any, ModelFacts | None], bool]:
    return lambda args, model: any(bool(getattr(args, name)) for name in names)


def _above_one(*names: str) -> Callable[[Any, ModelFacts | None], bool]:
    return lambda args, model: any((getattr(args, name) or 1) > 1 for name in names)


def _not_in(name: str, *values: object) -> Callable[[Any, ModelFacts | None], bool]:
    return lambda args, model: getattr(args, name) not in (None, *values)


def _model(
    predicate: Callable[[ModelFacts], bool],
) -> Callable[[Any, ModelFacts | None], bool]:
    return lambda args, model: model is not None and predicate(model)


def _prefill_graph(args: Any, model: ModelFacts | None) -> bool:
    if args.cuda_graph_backend_prefill not in (None, "disabled"):
        return True
    config = args.cuda_graph_config
    if isinstance(config, dict):
        prefill = config.get("prefill") or {}
        return bool(prefill.get("backend", "disabled") != "disabled")
    backend = getattr(getattr(config, "prefill", None), "backend", "disabled")
    return str(getattr(backend, "value", backend)) not in ("disabled", "None")


_OWN = "FairKV brings its own, so leave the flag out"
_LEAVE = "leave the flag out"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "another device",
        "--device",
        _not_in("device", "cuda", "cpu"),
        "use --device cuda or cpu",
    ),
    Refusal(
        "speculative decoding", "--speculative-algorithm", _on("speculative_algorithm"), _LEAVE
    ),
    Refusal(
        "prefill-decode disaggregation",
        "--disaggregation-mode",
        _not_in("disaggregation_mode", "null"),
        "use --disaggregation-mode null",
    ),
    Refusal(
        "a decode pool with role switch",
        "--enable-pd-role-switch",
        _on("enable_pd_role_switch"),
        _LEAVE,
    ),
    Refusal("PD multiplexing", "--enable-pdmux", _on("enable_pdmux"), _LEAVE),
    Refusal(
        "encoder disaggregation",
        "--encoder-only, --language-only",
        _on("encoder_only", "language_only"),
        _LEAVE,
    ),
    Refusal(
        "a hierarchical cache",
        "--enable-hierarchical-cache",
        _on("enable_hierarchical_cache", "hicache_storage_backend"),
        _LEAVE,
    ),
    Refusal("LMCache", "--enable-lmcache", _on("enable_lmcache"), _LEAVE),
    Refusal("FlexKV", "--enable-flexkv", _on("enable_flexkv"), _LEAVE),
    Refusal(
        "an external cache linker",
        "--enable-unified-cache-external-linker",
        _on("enable_unified_cache_external_linker"),
        _LEAVE,
    ),
    Refusal("HiSparse", "--enable-hisparse", _on("enable_hisparse"), _LEAVE),
    Refusal(
        "another radix cache",
        "--radix-cache-backend",
        _not_in("radix_cache_backend", "fairkv"),
        _OWN,
    ),
    Refusal(
        "another decode attention",
        "--decode-attention-backend",
        # SGLang may choose one for itself later; nobody asked for that one
        lambda args, model: model is None and bool(args.decode_attention_backend),
        "FairKV brings its own, see --fairkv-decode-backend; prompts take --attention-backend",
    ),
    Refusal(
        "another KV layout",
        "--enable-page-major-kv-layout, --enable-unified-memory",
        _on("enable_page_major_kv_layout", "enable_unified_memory"),
        _LEAVE,
    ),
    Refusal(
        "a prefill without KV cache",
        "--prefill-only-disable-kv-cache",
        _on("prefill_only_disable_kv_cache"),
        _LEAVE,
    ),
    Refusal("the KV canary", "--kv-canary", _not_in("kv_canary", "none"), "use --kv-canary none"),
    Refusal(
        "pipeline parallelism",
        "--pp-size above 1",
        _above_one("pp_size"),
        "use --pp-size 1 and a larger --tp-size",
    ),
    Refusal(
        "data parallelism",
        "--dp-size above 1 (untested)",
        _above_one("dp_size"),
        "use --dp-size 1; start several servers behind a router instead",
    ),
    Refusal("data-parallel attention", "--enable-dp-attention", _on("enable_dp_attention"), _LEAVE),
    Refusal(
        "context parallelism",
        "--dcp-size, --attn-cp-size above 1, --enable-prefill-cp",
        lambda args, model: (
            _above_one("dcp_size", "attn_cp_size")(args, model)
            or _on("enable_prefill_cp")(args, model)
        ),
        "leave the flags out",
    ),
    Refusal(
        "several nodes",
        "--nnodes above 1 (untested)",
        _above_one("nnodes"),
        "use --nnodes 1",
    ),
    Refusal(
        "overlapped half batches",
        "--enable-two-batch-overlap, --enable-single-batch-overlap",
        _on("enable_two_batch_overlap", "enable_single_batch_overlap"),
        _LEAVE,
    ),
    Refusal(
        "LoRA",
        "--enable-lora, --lora-paths (untested)",
        _on("enable_lora", "lora_paths"),
        "merge the adapter into the weights",
    ),
    Refusal(
        "a quantised KV cache",
        "--kv-cache-dtype",
        lambda args, model: (
            args.kv_cache_dtype not in (None, "auto", "bfloat16", "bf16", "float16", "float32")
        ),
        "use --kv-cache-dtype auto",
    ),
    Refusal(
        "quantised weights",
        "--quantization or the checkpoint",
        lambda args, model: bool(
            args.quantization or args.modelopt_quant or (model is not None and model.quantization)
        ),
        "use an unquantised checkpoint",
    ),
    Refusal(
        "weights that load behind the start",
        "--startup-weight-load-mode overlap (untested)",
        lambda args, model: args.startup_weight_load_mode == "overlap",
        _LEAVE,
    ),
    Refusal(
        "weights on the CPU",
        "--cpu-offload-gb, --offload-group-size",
        lambda args, model: (args.cpu_offload_gb or 0) > 0 or (args.offload_group_size or -1) > 0,
        _LEAVE,
    ),
    Refusal(
        "CUDA graphs in prefill",
        "--cuda-graph-backend-prefill (untested)",
        _prefill_graph,
        "leave it out or use disabled; decode keeps its graphs",
    ),
    Refusal(
        "torch.compile", "--enable-torch-compile (untested)", _on("enable_torch_compile"), _LEAVE
    ),
    Refusal(
        "deterministic inference",
        "--enable-deterministic-inference, --rl-on-policy-target",
        _on("enable_deterministic_inference", "rl_on_policy_target"),
        _LEAVE,
    ),
    Refusal("diffusion language models", "--dllm-algorithm", _on("dllm_algorithm"), _LEAVE),
    Refusal("multi-item scoring", "--enable-mis", _on("enable_mis"), _LEAVE),
    Refusal(
        "routed experts or indexer output",
        "--enable-return-routed-experts, --enable-return-indexer-topk",
        _on("enable_return_routed_experts", "enable_return_indexer_topk"),
        _LEAVE,
    ),
    Refusal(
        "streaming sessions",
        "--enable-streaming-session, --enable-session-radix-cache",
        _on("enable_streaming_session", "enable_session_radix_cache"),
        _LEAVE,
    ),
    Refusal("Ray", "--use-ray (untested)", _on("use_ray"), _LEAVE),
    Refusal(
        "a memory saver",
        "--enable-memory-saver (untested)",
        _on("enable_memory_saver"),
        _LEAVE,
    ),
    Refusal(
        "other model implementations",
        "--model-impl",
        _not_in("model_impl", "auto", "sglang"),
        "use --model-impl sglang",
    ),
    Refusal(
        "embedding and reward models",
        "--is-embedding or the model",
        lambda args, model: bool(args.is_embedding or (model is not None and not model.generates)),
        "use a model that generates",
    ),
    Refusal("multimodal models", "the model", _model(lambda m: m.multimodal), "use a text model"),
    Refusal(
        "encoder-decoder models",
        "the model",
        _model(lambda m: m.encoder_decoder),
        "use a decoder-only model",
    ),
    Refusal(
        "MLA and state-space models",
        "the model",
        _model(lambda m: m.attention != "MHA"),
        "use a model with grouped-query attention",
    ),
    Refusal(
        "sliding-window attention",
        "the model",
        _model(lambda m: m.sliding_window is not None and m.sliding_window < m.context),
        "use a model with full attention, or --context-length no longer than the window",
    ),
    Refusal(
        "this architecture",
        "the model",
        _model(lambda m: m.architecture not in ARCHITECTURES),
        f"supported are {', '.join(ARCHITECTURES)}",
    ),
)
"""Checked in this order; the first that applies is reported."""


def refuse(arguments: Any, model: ModelFacts | None = None) -> None:
    """Stop at the first combination that FairKV cannot serve.

    Args:
        arguments: SGLang's server arguments, as given or resolved.
        model: Facts of the model; rows about the model are skipped without.

    Raises:
        ConfigError: with the row's message.
    """
    for row in REFUSALS:
        if row.refused(_Lenient(arguments), model):
            raise ConfigError(row.message)


def check_split(model: ModelFacts, tp_size: int) -> None:
    """Check that SGLang can split the model over ``tp_size`` ranks.

    It deals out equal numbers of heads, or copies each KV head to the same number of ranks.

    Raises:
        ConfigError: naming the count that does not divide and the sizes that do.
    """

    def splits(ranks: int) -> bool:
        if model.intermediate is not None and model.intermediate % ranks:
            return False
        return model.q_heads % ranks == 0 and (
            model.kv_heads % ranks == 0 or ranks % model.kv_heads == 0
        )

    if splits(tp_size):
        return
    right = [str(ranks) for ranks in range(1, model.q_heads + 1) if splits(ranks)]
    raise ConfigError(
        f"--tp-size {tp_size}: {model.q_heads} query heads, {model.kv_heads} KV heads and an MLP "
        f"of {model.intermediate} cannot be split over {tp_size} ranks; use {' or '.join(right)}"
    )


def check_model(config: FairKVConfig, model: ModelFacts, tp_size: int, device: str) -> Plan:
    """Make the budgets and the plan of a start, which finds out what does not fit the model.

    Raises:
        ConfigError: for a profile or plan that is broken or of another model or TP size, and for
            budgets and placements that this model cannot have.
    """
    shape = model.shape(device)
    try:
        _, scope, _ = make_budgets(config, shape.num_layers, shape.num_kv_heads)
        return make_placement(config, shape, scope, tp_size)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from None


def table(rows: Iterable[Refusal] = REFUSALS) -> str:
    """The refusals as a Markdown table, for the README."""
    lines = ["| Refused with FairKV | Setting | Instead |", "|---|---|---|"]
    lines += [f"| {row.feature} | {row.setting} | {row.instead} |" for row in rows]
    return "\n".join(lines)

# SPDX-License-Identifier: Apache-2.0
"""What FairKV refuses: one list, from which the start-up check, the table of ``docs/support.md``
and a test are made.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fairkv_sglang import weight_formats as formats
from fairkv_sglang.architectures import ARCHITECTURES
from fairkv_sglang.model import Model

Predicate = Callable[[Any, Model | None], bool]
TRANSFER_BACKEND = "fairkv"
"""Value of ``--disaggregation-transfer-backend`` for kept rows over sockets."""


@dataclass(frozen=True)
class Refusal:
    """One thing that FairKV cannot be combined with.

    Attributes:
        feature: Its name, for people.
        setting: The flags, variable or model property that turn it on.
        instead: What the user can do.
        refused: Predicate on SGLang's server arguments (any object with its field names, missing
            ones read as None) and the model, which is None until its configuration has been read.
            None: any of the flags that ``setting`` names is given.
    """

    feature: str
    setting: str
    instead: str = "leave the flag out"
    refused: Predicate | None = None

    @property
    def fields(self) -> list[str]:
        """Fields of the server arguments that the flags of ``setting`` set."""
        return [flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", self.setting)]

    def applies(self, arguments: Any, model: Model | None) -> bool:
        """Whether this start asks for it."""
        arguments = _Lenient(arguments)
        if self.refused is not None:
            return self.refused(arguments, model)
        return any(bool(getattr(arguments, name)) for name in self.fields)

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


def _above_one(*names: str) -> Predicate:
    return lambda args, model: any((getattr(args, name) or 1) > 1 for name in names)


def _not_in(name: str, *values: object) -> Predicate:
    return lambda args, model: getattr(args, name) not in (None, *values)


def _model(predicate: Callable[[Model], bool]) -> Predicate:
    return lambda args, model: model is not None and predicate(model)


def _disaggregated(args: Any) -> bool:
    return args.disaggregation_mode not in (None, "null")


def _prefill_graph(args: Any, model: Model | None) -> bool:
    if args.cuda_graph_backend_prefill not in (None, "disabled"):
        return True
    config = args.cuda_graph_config
    if isinstance(config, dict):
        prefill = config.get("prefill") or {}
        return bool(prefill.get("backend", "disabled") != "disabled")
    backend = getattr(getattr(config, "prefill", None), "backend", "disabled")
    return str(getattr(backend, "value", backend)) not in ("disabled", "None")


def _variable(name: str) -> Predicate:
    """Whether a variable of SGLang's environment, which is a switch, is on."""

    def on(args: Any, model: Model | None) -> bool:
        from sglang.srt.environ import envs

        return bool(getattr(envs, name).get())

    return on


_WITH_WINDOWS = {row.name for row in ARCHITECTURES.values() if row.sliding}

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "another device",
        "--device",
        "use --device cuda or cpu",
        _not_in("device", "cuda", "cpu"),
    ),
    Refusal(
        "speculative decoding (EAGLE, MTP, NGRAM and all others)",
        "--speculative-algorithm, --decoupled-spec-role",
        "leave the flags out: decode writes one token of a request at a time and checks no drafts",
        lambda args, model: (
            bool(args.speculative_algorithm) or args.decoupled_spec_role not in (None, "null")
        ),
    ),
    Refusal(
        "a transfer backend of SGLang's in prefill-decode disaggregation",
        "--disaggregation-transfer-backend",
        f"use {TRANSFER_BACKEND}: no other one knows head pages",
        lambda args, model: (
            _disaggregated(args) and args.disaggregation_transfer_backend != TRANSFER_BACKEND
        ),
    ),
    Refusal(
        "prefill-decode disaggregation of replicas or over several nodes",
        "--disaggregation-mode with --dp-size or --nnodes above 1 (untested)",
        "start more servers, behind a router",
        lambda args, model: _disaggregated(args) and _above_one("dp_size", "nnodes")(args, model),
    ),
    Refusal(
        "what keeps, checks or moves whole prompts on a decode server",
        "--disaggregation-decode-enable-radix-cache, --disaggregation-decode-enable-offload-kvcache"
        ", --disaggregation-enable-kv-checksum, --disaggregation-decode-extra-slots",
        "leave the flags out",
    ),
    Refusal(
        "a copy of requests that a decode server retracts",
        "--disaggregation-decode-retraction-backup",
        "use none: they are answered with 503, to be asked again",
        _not_in("disaggregation_decode_retraction_backup", "none"),
    ),
    Refusal(
        "prefill before its decode server is known",
        "--optimistic-prefill-attempts",
        "leave the flag out",
    ),
    Refusal("a server that switches between prefill and decode", "--enable-pd-role-switch"),
    Refusal("PD multiplexing", "--enable-pdmux"),
    Refusal("encoder disaggregation", "--encoder-only, --language-only"),
    Refusal(
        "a hierarchical cache",
        "--enable-hierarchical-cache",
        refused=lambda args, model: bool(
            args.enable_hierarchical_cache or args.hicache_storage_backend
        ),
    ),
    Refusal("LMCache", "--enable-lmcache"),
    Refusal("FlexKV", "--enable-flexkv"),
    Refusal("an external cache linker", "--enable-unified-cache-external-linker"),
    Refusal("HiSparse", "--enable-hisparse"),
    Refusal(
        "another radix cache",
        "--radix-cache-backend",
        "FairKV brings its own, so leave the flag out",
        _not_in("radix_cache_backend", "fairkv"),
    ),
    Refusal(
        "another decode attention",
        "--decode-attention-backend",
        "FairKV brings its own, see --fairkv-decode-backend; prompts take --attention-backend",
        # SGLang may choose one for itself later; nobody asked for that one
        lambda args, model: model is None and bool(args.decode_attention_backend),
    ),
    Refusal("another KV layout", "--enable-page-major-kv-layout, --enable-unified-memory"),
    Refusal(
        "SGLang's HND layout",
        "SGLANG_USE_HND_KVCACHE",
        "unset the variable",
        _variable("SGLANG_USE_HND_KVCACHE"),
    ),
    Refusal(
        "SGLang's Rust server",
        "SGLANG_RUST_SERVER",
        "unset the variable: requests would come past the checks of FairKV's options",
        _variable("SGLANG_RUST_SERVER"),
    ),
    Refusal("a prefill without KV cache", "--prefill-only-disable-kv-cache"),
    Refusal("the KV canary", "--kv-canary", "use --kv-canary none", _not_in("kv_canary", "none")),
    Refusal(
        "pipeline parallelism",
        "--pp-size above 1",
        "use --pp-size 1 and a larger --tp-size",
        _above_one("pp_size"),
    ),
    Refusal(
        "data parallelism over several nodes",
        "--dp-size and --nnodes above 1",
        "start a server on each node, behind a router",
        lambda args, model: (args.dp_size or 1) > 1 and (args.nnodes or 1) > 1,
    ),
    Refusal(
        "data-parallel attention",
        "--enable-dp-attention, --attn-dp-size above 1",
        "leave the flags out",
        lambda args, model: (
            bool(args.enable_dp_attention) or _above_one("attn_dp_size")(args, model)
        ),
    ),
    Refusal(
        "expert parallelism",
        "--ep-size above 1, --moe-a2a-backend (untested)",
        "leave the flags out: SGLang splits every expert over the ranks",
        lambda args, model: (
            _above_one("ep_size")(args, model) or args.moe_a2a_backend not in (None, "none")
        ),
    ),
    Refusal(
        "context parallelism",
        "--dcp-size, --attn-cp-size above 1, --enable-prefill-cp",
        "leave the flags out",
        lambda args, model: (
            _above_one("dcp_size", "attn_cp_size")(args, model) or bool(args.enable_prefill_cp)
        ),
    ),
    Refusal(
        "several nodes without an address where they meet",
        "--nnodes above 1 without --dist-init-addr",
        "give every node --dist-init-addr HOST:PORT, with a host of node 0 and a free port there",
        lambda args, model: (
            (args.nnodes or 1) > 1 and not re.fullmatch(r".+:\d+", args.dist_init_addr or "")
        ),
    ),
    Refusal(
        "ranks that the nodes do not divide",
        "--tp-size and --nnodes",
        "use a --tp-size that --nnodes divides",
        lambda args, model: bool((args.tp_size or 1) % (args.nnodes or 1)),
    ),
    Refusal(
        "several tokenizer processes",
        "--tokenizer-worker-num above 1 (untested)",
        "leave the flag out",
        _above_one("tokenizer_worker_num"),
    ),
    Refusal("overlapped half batches", "--enable-two-batch-overlap, --enable-single-batch-overlap"),
    Refusal(
        "LoRA",
        "--enable-lora, --lora-paths (untested)",
        "merge the adapter into the weights",
    ),
    Refusal(
        "a quantised KV cache",
        "--kv-cache-dtype",
        "use --kv-cache-dtype auto",
        _not_in("kv_cache_dtype", "auto", "bfloat16", "bf16", "float16", "float32"),
    ),
    Refusal(
        "a KV cache of another type than the model",
        "--kv-cache-dtype and --dtype",
        "use --kv-cache-dtype auto",
        lambda args, model: bool(
            model is not None
            and model.dtype
            and {"bf16": "bfloat16"}.get(args.kv_cache_dtype, args.kv_cache_dtype)
            not in (None, "auto", model.dtype)
        ),
    ),
    Refusal(
        "a KV cache that the checkpoint quantises",
        "the checkpoint",
        "use one without scales for the KV cache",
        _model(formats.with_quantised_cache),
    ),
    Refusal(
        "weights that are quantised while they are loaded",
        "--quantization",
        "use a checkpoint that is quantised already, or none that is",
        lambda args, model: bool(
            args.modelopt_quant or (model is not None and formats.scaled_while_loading(model))
        ),
    ),
    Refusal(
        "quantised weights of this kind",
        "the checkpoint",
        "use fp8, AWQ or GPTQ (on CUDA, by Marlin), or unquantised weights",
        _model(formats.of_another_kind),
    ),
    Refusal(
        "AWQ or GPTQ weights with act-order or without groups",
        "the checkpoint",
        "use one with desc_act false and a group size",
        _model(formats.in_another_order),
    ),
    Refusal(
        "quantised blocks or groups that do not divide a head",
        "the checkpoint and --tp-size",
        "use smaller blocks, a scale for each channel, or no more ranks than KV heads",
        lambda args, model: (
            model is not None and formats.wider_than_a_head(model, args.tp_size or 1)
        ),
    ),
    Refusal(
        "weights that load behind the start",
        "--startup-weight-load-mode overlap (untested)",
        refused=lambda args, model: args.startup_weight_load_mode == "overlap",
    ),
    Refusal(
        "weights on the CPU",
        "--cpu-offload-gb, --offload-group-size",
        refused=lambda args, model: (
            (args.cpu_offload_gb or 0) > 0 or (args.offload_group_size or -1) > 0
        ),
    ),
    Refusal(
        "CUDA graphs in prefill",
        "--cuda-graph-backend-prefill (untested)",
        "leave it out or use disabled; decode keeps its graphs",
        _prefill_graph,
    ),
    Refusal("torch.compile", "--enable-torch-compile (untested)"),
    Refusal(
        "kernels that run a whole model",
        "--enable-nvidia-megakernel, --enable-amd-monokernel",
        "leave the flags out",
        lambda args, model: bool(args.enable_nvidia_megakernel or args.enable_amd_monokernel),
    ),
    Refusal(
        "a KV cache that ranks share",
        "--enable-kv-cache-sharding",
        refused=lambda args, model: bool(args.enable_kv_cache_sharding),
    ),
    Refusal("deterministic inference", "--enable-deterministic-inference, --rl-on-policy-target"),
    Refusal("diffusion language models", "--dllm-algorithm"),
    Refusal("multi-item scoring", "--enable-mis"),
    Refusal(
        "routed experts or indexer output",
        "--enable-return-routed-experts, --enable-return-indexer-topk",
    ),
    Refusal("streaming sessions", "--enable-streaming-session, --enable-session-radix-cache"),
    Refusal("Ray", "--use-ray (untested)"),
    Refusal("a memory saver", "--enable-memory-saver (untested)"),
    Refusal(
        "other model implementations",
        "--model-impl",
        "use --model-impl sglang",
        _not_in("model_impl", "auto", "sglang"),
    ),
    Refusal(
        "embedding and reward models",
        "--is-embedding or the model",
        "use a model that generates",
        lambda args, model: bool(args.is_embedding or (model is not None and not model.generates)),
    ),
    Refusal("multimodal models", "the model", "use a text model", _model(lambda m: m.multimodal)),
    Refusal(
        "encoder-decoder models",
        "the model",
        "use a decoder-only model",
        _model(lambda m: m.encoder_decoder),
    ),
    Refusal(
        "multi-head latent attention (MLA: DeepSeek V2 and V3, Kimi K2, MiniCPM3)",
        "the model",
        "use a model with grouped-query attention",
        _model(lambda m: m.attention == "MLA"),
    ),
    Refusal(
        "state-space models (Mamba)",
        "the model",
        "use a model with grouped-query attention",
        _model(lambda m: m.attention == "SSM"),
    ),
    Refusal(
        "hybrids of attention and linear or state-space layers (Qwen3-Next, Qwen3.5, Nemotron-H)",
        "the model",
        "use a model with grouped-query attention in every layer",
        _model(lambda m: m.hybrid),
    ),
    Refusal(
        "sliding-window attention (Gemma 2)",
        "the model",
        "use a model with full attention, or --context-length no longer than the window",
        _model(
            lambda m: (
                m.sliding_window is not None
                and m.sliding_window < m.context
                and not (m.sliding and m.architecture in _WITH_WINDOWS)
            )
        ),
    ),
    Refusal(
        "this architecture",
        "the model",
        f"supported are {', '.join(ARCHITECTURES)}",
        _model(lambda m: m.architecture not in ARCHITECTURES),
    ),
)
"""Checked in this order; the first that applies is reported."""

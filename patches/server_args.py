# SPDX-License-Identifier: Apache-2.0
"""Hooks on SGLang's server arguments: the flags, and what FairKV sets, checks and refuses.

These are the only hooks of a process in which FairKV is off. All of this happens in the parent,
before a model is loaded; children read the result from the environment.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from fairkv_sglang.config import (
    FILE_VARIABLE,
    FLAG,
    RESOLVED_VARIABLE,
    ConfigError,
    FairKVConfig,
    add_flags,
    from_environment,
    from_flags,
    registries,
)
from fairkv_sglang.model import Model
from fairkv_sglang.near_miss import guard
from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.refusals import TRANSFER_BACKEND

if TYPE_CHECKING:
    from fairkv_sglang.planning import Start

logger = logging.getLogger(__name__)


class _State:
    """What this process has been told; the environment is asked only when it was nothing."""

    engine: FairKVConfig | None = None  # by the FairKV engine that is being started
    command_line: FairKVConfig | None = None  # by a parsed command line


@contextmanager
def starting(config: FairKVConfig | None) -> Iterator[None]:
    """Use ``config`` for the engine that is started inside; None leaves the environment's.

    The environment that child processes read is put back afterwards.
    """
    from fairkv_sglang.plan_file import PLAN_VARIABLE

    before = {name: os.environ.get(name) for name in (RESOLVED_VARIABLE, PLAN_VARIABLE)}
    _State.engine = config
    try:
        yield
    finally:
        _State.engine = None
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def after_add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    """Add the FairKV group to SGLang's parser; a mistyped flag of it gets one line."""
    from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES

    if TRANSFER_BACKEND not in DISAGG_TRANSFER_BACKEND_CHOICES:
        DISAGG_TRANSFER_BACKEND_CHOICES.append(TRANSFER_BACKEND)
    add_flags(parser)
    guard(parser, FLAG)


def before_from_cli_args(cls: type, arguments: argparse.Namespace) -> None:
    """Validate FairKV's flags; a wrong one ends the process with status 2."""
    try:
        _State.command_line = from_flags(arguments)
    except ConfigError as error:
        _exit(error)


def around_resolve(original: Any, server_args: Any) -> None:
    """Settle SGLang's arguments for FairKV around SGLang's own resolution.

    Raises:
        ConfigError: when the arguments cannot be served; on a command line the process ends with
            status 2 instead.
    """
    if getattr(server_args, "_resolution_finished", False):
        original(server_args)
        return
    try:
        _resolve(original, server_args)
    except ConfigError as error:
        if _State.engine is None and _State.command_line is not None:
            _exit(error)
        raise


def _resolve(original: Any, server_args: Any) -> None:
    # Here, not above: a rank without FairKV need not import what makes plans (scipy, 0.3 s).
    from sglang.srt.arg_groups.overrides import resolving_view

    from fairkv_sglang import support
    from fairkv_sglang.patches import versions
    from fairkv_sglang.patches.cpu_platform import is_active
    from fairkv_sglang.patches.processes import register_parent
    from fairkv_sglang.plan_file import PLAN_VARIABLE, hand_out

    config = _of_role(_configuration(), server_args.disaggregation_mode)
    _export(config)
    os.environ.pop(PLAN_VARIABLE, None)  # of an earlier start
    on_cpu = is_active()
    disaggregated = server_args.disaggregation_mode != "null"
    if server_args.disaggregation_transfer_backend == TRANSFER_BACKEND and not (
        config.enabled and disaggregated
    ):
        raise ConfigError(
            f"--disaggregation-transfer-backend {TRANSFER_BACKEND} is FairKV's: add "
            "--fairkv and --disaggregation-mode prefill or decode"
        )
    if on_cpu or config.enabled:
        _check_devices(server_args)
    if on_cpu:
        _settle_cpu(server_args)
    if config.enabled and disaggregated:
        versions.check_disaggregation()
    if config.enabled:
        support.refuse(server_args)
        repeats = registries()["scorer"][config.scorer].repeats
        if repeats and server_args.skip_tokenizer_init:
            raise ConfigError(
                f"scorer {config.scorer} asks the model in words to repeat a prompt, so it needs "
                "the tokenizer: leave --skip-tokenizer-init out"
            )
        own_engine = os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1"
        if not on_cpu and (own_engine or str(server_args.device).startswith("cpu")):
            raise ConfigError(
                "FairKV on a CPU runs on its own platform: unset SGLANG_USE_CPU_ENGINE"
                if own_engine
                else "--device cpu with FairKV needs a machine without an accelerator: hide it "
                "with CUDA_VISIBLE_DEVICES='' or leave --device out"
            )
        _settle(server_args)
    try:
        original(server_args)
    except Exception:
        if config.enabled and _has_model(server_args):
            _refuse_model(server_args)
        raise
    if not (config.enabled or on_cpu) or not _has_model(server_args):
        return
    view = resolving_view(server_args)  # resolution does not write back to the record
    model = read_model(server_args)
    if config.enabled:
        support.refuse(view, model)
        if disaggregated:
            support.check_disaggregated(config, model)
    support.check_split(model, view.tp_size)
    if config.enabled:
        start = support.check_start(config, model, view.tp_size, str(view.device))
        _check_memory(start, view)
        plan = start.plan
        os.environ[PLAN_VARIABLE] = hand_out(plan)
        register_parent(disaggregated)
        logger.info(
            "FairKV is on: %s, plan %s",
            config.model_dump_json(exclude_defaults=True),
            plan.digest[:12],
        )


def _refuse_model(server_args: Any) -> None:
    """SGLang could not settle its arguments: of a model that FairKV does not serve say that, and
    not what SGLang misses for it on this machine.
    """
    from fairkv_sglang import support

    try:
        model = read_model(server_args)
    except Exception:  # then SGLang's own error says it
        return
    support.refuse(server_args, model)


def _check_devices(server_args: Any) -> None:
    """What SGLang would find out in a rank, or never say."""
    import torch

    if server_args.tp_size < 1:
        raise ConfigError(f"--tp-size {server_args.tp_size}: give the number of ranks, 1 or more")
    if str(server_args.device).startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {server_args.device}: torch finds no CUDA device on this machine; leave the "
            "flag out to use what there is"
        )


def _check_memory(start: Start, view: Any) -> None:
    """Divide the most memory that there can be: what does not fit into that does not fit at all.

    Ranks divide what is free when their weights are loaded.
    """
    import psutil  # type: ignore[import-untyped]
    from sglang.srt.utils import get_device_memory_capacity

    from fairkv_sglang.cpu_environment import memory_per_rank, ranks_here
    from fairkv_sglang.memory.sizing import divide_memory, most_of_a_pass
    from fairkv_sglang.parallel.lanes import LaneTable

    model, config = start.model, start.config
    # None and auto: the model's own
    dtype_bytes = {"float32": 4, "float16": 2, "bfloat16": 2, "bf16": 2}.get(
        str(view.kv_cache_dtype), model.dtype_bytes
    )
    heads = max(1, model.num_kv_heads // view.tp_size)
    token_bytes = 2 * model.head_dim * dtype_bytes * heads * model.num_layers
    memory = int((get_device_memory_capacity(str(view.device)) or 0) * (1 << 20))
    if str(view.device).startswith("cpu"):
        memory = int(memory_per_rank(psutil.virtual_memory().total, 1, ranks_here(view)))
    bounds = [view.max_total_tokens or 0, memory // token_bytes]
    if not any(bounds):
        return
    try:
        divide_memory(
            lane_slots=LaneTable(start.plan, start.room).capacity,
            total_tokens=min(filter(None, bounds)),
            stock_heads=heads,
            head_dim=model.head_dim,
            dtype_bytes=dtype_bytes,
            page_size=view.page_size or 1,
            context_len=model.context,
            pass_tokens=most_of_a_pass(view.chunked_prefill_size, view.max_prefill_tokens),
            max_requests=1,
            prefill_pool=config.prefill_pool,
            max_head_tokens=config.max_head_tokens,
            arena_pages=config.debug.arena_pages,
            recent_bytes=config.recent_queries * model.group_size * model.head_dim * dtype_bytes,
            score_bytes=start.score_bytes(heads),
            sliding_window=model.ring,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def read_model(server_args: Any) -> Model:
    """The model that the arguments name; reads its config.json, no weights."""
    from sglang.srt.arg_groups.overrides import model_config_of

    return Model.from_sglang(model_config_of(server_args))


def _configuration() -> FairKVConfig:
    """This start's configuration, FairKV off if nobody asked for it.

    A resolved configuration that is in the environment already is some other start's.
    """
    user = {key: value for key, value in os.environ.items() if key == FILE_VARIABLE}
    return _State.engine or _State.command_line or from_environment(user) or FairKVConfig()


def _of_role(config: FairKVConfig, mode: str) -> FairKVConfig:
    """On a prefill server prompts are computed, and kept rows wait, on SGLang's own placement.

    Plans are the decode server's alone.
    """
    if mode != "prefill" or not config.enabled:
        return config
    others = {"placement", "plan", "replan", *config.options("placement")}
    values = config.model_dump(exclude=others)
    return FairKVConfig(**values, placement="contiguous", replan="off")


def _export(config: FairKVConfig) -> None:
    """Tell the children; also that FairKV is off, if the environment says anything else."""
    if config.enabled or FILE_VARIABLE in os.environ or RESOLVED_VARIABLE in os.environ:
        os.environ[RESOLVED_VARIABLE] = config.to_json()


def _settle(server_args: Any) -> None:
    """Set what FairKV needs; the check before made sure that nobody asked for other values."""
    from fairkv_sglang.patches.prefix_cache import BACKEND_NAME

    server_args.radix_cache_backend = BACKEND_NAME
    # One pool for all layers: decode takes no slot of any, so two would be two to divide.
    server_args.disable_hybrid_swa_memory = True
    # Decode is FairKV's, so SGLang builds one backend, the one for prompts.
    if server_args.prefill_attention_backend is not None:
        server_args.attention_backend = server_args.prefill_attention_backend
        server_args.prefill_attention_backend = None
    if server_args.disaggregation_mode == "decode":
        server_args.disaggregation_decode_extra_slots = 0
        server_args.disaggregation_decode_retraction_backup = "none"
    # Compacting a prompt is host-driven and must not be captured.
    if server_args.cuda_graph_backend_prefill is None:
        server_args.disable_prefill_cuda_graph = True


def _settle_cpu(server_args: Any) -> None:
    """Device and threads, for SGLang with or without FairKV."""
    from fairkv_sglang.cpu_environment import all_ranks, prepare_threads, ranks_here

    if server_args.device is None:
        server_args.device = "cpu"
    # SGLang's torch backend reads the pool of sliding windows at the slots of the other pool.
    server_args.disable_hybrid_swa_memory = True
    if str(server_args.device).startswith("cpu"):
        prepare_threads(ranks_here(server_args), all_ranks(server_args))


def _has_model(server_args: Any) -> bool:
    return str(server_args.model_path).lower() not in ("none", "dummy")


def _exit(error: ConfigError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def flag_hooks() -> tuple[Hook, ...]:
    """The hooks that are always there."""
    return (
        Hook(
            target="sglang.srt.server_args.ServerArgs.add_cli_args",
            kind="after",
            function=after_add_cli_args,
            why="the --fairkv flags stand next to SGLang's",
            since="0.5.15",
            upstream="sglang/srt/server_args.py (no seam for a plugin's flags)",
            test="tests/engine/test_platform.py",
        ),
        Hook(
            target="sglang.srt.server_args.ServerArgs.from_cli_args",
            kind="before",
            function=before_from_cli_args,
            why="flags are validated before anything starts; SGLang keeps only its own fields",
            since="0.5.15",
            upstream="sglang/srt/server_args.py",
            test="tests/engine/test_platform.py",
        ),
        Hook(
            target="sglang.srt.server_args.ServerArgs.resolve_once",
            kind="around",
            function=around_resolve,
            why="the prefix cache is FairKV's for every way of starting, and what FairKV cannot "
            "serve is refused before weights are loaded",
            since="0.5.15 (__post_init__ up to 0.5.19, resolve_once after)",
            upstream="sglang/srt/server_args.py",
            test="tests/engine/test_platform.py",
        ),
    )

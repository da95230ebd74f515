# SPDX-License-Identifier: Apache-2.0
"""Hooks for SGLang on the CPU platform of this package, with FairKV on or off."""

from __future__ import annotations

from typing import Any

from fairkv_sglang.cpu_environment import memory_per_rank, ranks_here, yield_to_gloo_workers
from fairkv_sglang.patches.ledger import Hook


def around_unaligned_tp(original: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Leave head counts alone.

    SGLang pads counts that TP does not divide; its weight loaders know the padding only
    in its own CPU engine, and on this platform fail on a padded model. Without padding SGLang
    copies KV heads to ranks as it does on a GPU; splits that need padding are refused at start.
    """
    return model_config


_model_checks = False  # while SGLang asks whether a model runs on the backend


def around_model_checks(original: Any, server_args: Any) -> Any:
    """See :func:`after_attention_backends`."""
    global _model_checks
    _model_checks = True
    try:
        return original(server_args)
    finally:
        _model_checks = False


def after_attention_backends(result: tuple[str, str], *args: Any) -> tuple[str, ...]:
    """SGLang refuses gpt-oss on its torch backend, which on this platform has what it needs.

    A hook on a function reaches all modules that import it, and only one of them checks models.
    """
    if not _model_checks:
        return result
    return tuple("intel_amx" if name == "torch_native" else name for name in result)


def after_init_torch_distributed(result: Any, *args: Any, **kwargs: Any) -> Any:
    """The rank's process groups exist: see ``cpu_environment.yield_to_gloo_workers``."""
    yield_to_gloo_workers()
    return result


def after_available_memory(result: float, device: str, *args: Any, **kwargs: Any) -> float:
    """GiB that this rank may take; from the same numbers on all ranks if ``result`` is of all."""
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.utils.common import get_cpu_ids_by_node

    if device != "cpu":
        return result
    return memory_per_rank(result, len(get_cpu_ids_by_node()), ranks_here(get_parallel()))


def register_attention() -> None:
    """SGLang's torch backend without its work on cached tokens, for FairKV on and off alike."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    def create(runner: Any) -> Any:
        from fairkv_sglang.patches.cpu_attention import CpuAttnBackend

        return CpuAttnBackend(runner)

    ATTENTION_BACKENDS["torch_native"] = create


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        kind="around",
        function=around_unaligned_tp,
        why="fewer KV heads than ranks fails while weights are loaded on an out-of-tree CPU "
        "platform",
        since="0.5.14",
        upstream="sglang/srt/configs/update_config.py; called in model_executor/model_runner.py "
        "for every platform with device cpu",
        test="tests/engine/test_platform.py",
    ),
    Hook(
        target="sglang.srt.arg_groups.model_hook.handle_model_specific_adjustments",
        kind="around",
        function=around_model_checks,
        why="what a model may run on is asked in one place, by a function that has many callers",
        since="0.5.21",
        upstream="sglang/srt/arg_groups/pipeline.py",
        test="tests/engine/test_sliding.py",
    ),
    Hook(
        target="sglang.srt.arg_groups.model_hook.attention_backends_of",
        kind="after",
        function=after_attention_backends,
        why="SGLang serves gpt-oss on a CPU with its AMX backend only",
        since="0.5.21",
        upstream="sglang/srt/arg_groups/model_hook.py (handle_model_specific_adjustments)",
        test="tests/engine/test_sliding.py",
    ),
)
"""Of every process."""

RANK_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.init_torch_distributed",
        kind="after",
        function=after_init_torch_distributed,
        why="gloo's network threads interrupt the threads that they wait for, which makes an "
        "all-reduce take milliseconds where ranks have one core each",
        since="0.5.17",
        upstream="sglang/srt/model_executor/model_runner.py",
        test="tests/engine/test_platform.py",
    ),
    Hook(
        target="sglang.srt.utils.common.get_available_gpu_memory",
        kind="after",
        function=after_available_memory,
        why="each rank would take the memory of the whole machine for its own",
        since="0.5.17",
        upstream="sglang/srt/utils/common.py",
        test="tests/engine/test_platform.py",
    ),
)
"""Of the ranks."""

# SPDX-License-Identifier: Apache-2.0
"""Installed but not asked for, the plugin leaves SGLang as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairkv_tests.tiny_models import hugging_face_outputs
from fairkv_tests.workloads import BATCH, NEW_TOKENS


def _probe(log: str, kind: str) -> list[list[str]]:
    """What the probe plugin saw in the rank's process."""
    lines = [line.split()[1:] for line in log.splitlines() if line.startswith("PROBE ")]
    return [words for word, *words in lines if word == kind]


def test_rank_is_sglangs_own(stock: Callable[[str], Any]) -> None:
    """Cache and pools are SGLang's classes, the attention backend is the CPU platform's, which is
    SGLang's but for one method; no hook but those of arguments and CPU platform; nothing else of
    FairKV's memory or attention is even imported.
    """
    run = stock("llama")
    classes = _probe(run.log, "class")
    assert [name for _, name in classes][:3] == [
        "UnifiedRadixCache", "CpuAttnBackend", "MHATokenToKVPool",
    ]  # fmt: skip
    modules = [module for module, _ in classes]
    assert len(modules) == 4 and modules.pop(1) == "fairkv_sglang.patches.cpu_attention"
    assert all(module.startswith("sglang.") for module in modules)
    (hooks,) = _probe(run.log, "hooks")
    arguments = "sglang.srt.server_args.ServerArgs."
    assert {hook for hook in hooks if not hook.startswith(arguments)} == {
        "sglang.srt.arg_groups.model_hook.attention_backends_of",
        "sglang.srt.arg_groups.model_hook.handle_model_specific_adjustments",
        "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        "sglang.srt.model_executor.model_runner.ModelRunner.init_torch_distributed",
        "sglang.srt.utils.common.get_available_gpu_memory",
        "sglang.srt.managers.scheduler.Scheduler.__init__",  # the probe itself
    }
    (imported,) = _probe(run.log, "modules")
    for part in ("memory", "attention", "control", "kernels", "placement", "budgets", "parallel"):
        found = {module for module in imported if module.startswith(f"fairkv_sglang.{part}")}
        assert not found, part
    assert "fairkv" not in run.state
    assert "FairKV" not in run.log


def test_outputs_are_the_models(stock: Callable[[str], Any]) -> None:
    """The reference of the identity tests is itself right."""
    run = stock("llama")
    assert run.outputs == hugging_face_outputs(run.model, BATCH, NEW_TOKENS)

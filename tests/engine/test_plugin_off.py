# SPDX-License-Identifier: Apache-2.0
"""Installed but not asked for, the plugin leaves SGLang as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny_models import hugging_face_outputs
from workloads import BATCH, NEW_TOKENS


def _probe(log: str, kind: str) -> list[list[str]]:
    """What the probe plugin saw in the rank's process."""
    lines = [line.split()[1:] for line in log.splitlines() if line.startswith("PROBE ")]
    return [words for word, *words in lines if word == kind]


def test_rank_is_sglangs_own(stock: Callable[[str], Any]) -> None:
    """Cache, attention backend and pools are SGLang's classes; no hook but those of arguments and
    CPU platform; nothing of FairKV's memory or attention is even imported.
    """
    run = stock("llama")
    classes = _probe(run.log, "class")
    assert len(classes) == 4
    assert all(module.startswith("sglang.") for module, _ in classes)
    assert [name for _, name in classes][:3] == [
        "UnifiedRadixCache", "TorchNativeAttnBackend", "MHATokenToKVPool",
    ]  # fmt: skip
    (hooks,) = _probe(run.log, "hooks")
    arguments = "sglang.srt.server_args.ServerArgs."
    assert {hook for hook in hooks if not hook.startswith(arguments)} == {
        "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        "sglang.srt.model_executor.model_runner.ModelRunner.init_torch_distributed",
        "sglang.srt.managers.scheduler.Scheduler.__init__",  # the probe itself
    }
    (modules,) = _probe(run.log, "modules")
    for part in ("memory", "attention", "runtime", "kernels", "placement", "budgets"):
        assert not any(module.startswith(f"fairkv_sglang.{part}") for module in modules)
    assert "fairkv" not in run.state
    assert "FairKV" not in run.log


def test_outputs_are_the_models(stock: Callable[[str], Any]) -> None:
    """The reference of the identity tests is itself right."""
    run = stock("llama")
    assert run.outputs == hugging_face_outputs(run.model, BATCH, NEW_TOKENS)

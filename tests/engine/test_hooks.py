# SPDX-License-Identifier: Apache-2.0
"""Every hook is in effect in every rank, and a rank in which one is not refuses to serve.

That a *served* rank has all hooks is asserted wherever a test reads FairKV's state
(``EngineProcess.fairkv``); here each hook is taken away.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairkv_tests.engine_process import EngineProcess
from fairkv_tests.plugin_folder import install_plugin
from fairkv_tests.workloads import ENGINE, MODEL

_TAKE_AWAY = """
import json, pkgutil
import sglang
from sglang.srt.plugins.hook_registry import HookRegistry
from fairkv_sglang.patches import HookError, all_hooks, ledger
from fairkv_sglang.patches.rank import this_rank

hooks = all_hooks()
before = 0
try:
    ledger.verify(hooks)
except HookError as error:
    before = str(error)
ledger.register(hooks)
HookRegistry.apply_hooks()
results = {"targets": ledger.verify(hooks), "before": before, "hooks": {}}
try:
    this_rank()
except RuntimeError as error:
    results["no rank"] = str(error)

def refusal():
    try:
        ledger.verify(hooks)
    except HookError as error:
        return str(error)

for hook in hooks:
    owner_name, _, name = hook.target.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    patched = vars(owner)[name]
    setattr(owner, name, lambda *args, **kwargs: None)
    replaced = refusal()
    delattr(owner, name)
    deleted = refusal()
    setattr(owner, name, patched)
    results["hooks"][f"{hook.kind} {hook.target}"] = [
        replaced, deleted, hook.why, hook.test, bool(hook.since and hook.upstream)
    ]
results["after"] = ledger.verify(hooks)

from sglang.srt.managers import schedule_batch
from sglang.srt.mem_cache import allocation
results["imported by name"] = schedule_batch.alloc_for_decode is allocation.alloc_for_decode
from sglang.srt.beam_search.coordinator import BeamCoordinator
coordinator = BeamCoordinator(
    model_config=None, spec_algorithm=None, dllm_enabled=False, max_req_len=9, future_map=None,
    req_to_token_pool=None, token_to_kv_pool_allocator=None, tree_cache=None,
)
results["beam"] = coordinator.validate_and_init(None, None)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What a process says from which each hook was taken away in turn."""
    done = subprocess.run(
        [sys.executable, "-c", _TAKE_AWAY], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.smoke
def test_all_hooks_apply_to_this_sglang(results: dict[str, Any]) -> None:
    """From none to all; the check sees the difference."""
    assert "FairKV cannot run" in results["before"] and "load_model" in results["before"]
    assert len(results["targets"]) == len(results["hooks"])
    assert results["after"] == results["targets"]
    assert results["imported by name"]  # other modules see the function that is hooked
    assert "FairKV" in results["beam"]


def test_each_hook_taken_away_is_named(results: dict[str, Any]) -> None:
    """Overwritten by other code, or without a target in this SGLang: name and reason."""
    for label, (replaced, deleted, why, *_) in results["hooks"].items():
        target = label.split()[1]
        assert replaced and target in replaced and "did not take effect" in replaced, label
        # a base class may still have an attribute of that name, which then lacks the hook
        assert deleted and target in deleted, label
        assert "has no target in this SGLang" in deleted or "did not take effect" in deleted
        first = next(row[2] for k, row in results["hooks"].items() if target in k.split())
        assert why in replaced or first in replaced


def test_the_hook_that_checks_the_others_is_missed_too(results: dict[str, Any]) -> None:
    """Without the hook on ``load_model`` there is no rank state, and who asks for it says why."""
    assert "ModelRunner.load_model did not take effect" in results["no rank"]


def test_rows_of_the_ledger_are_complete(results: dict[str, Any]) -> None:
    """Reason, version, place upstream, and a test that exists."""
    root = Path(__file__).parents[2]
    for label, (_, _, why, test, complete) in results["hooks"].items():
        assert why and complete and test.startswith("tests/") and (root / test).is_file(), label


# Nothing but the check would notice: twins would keep old weights after an update.
_MISSING = """
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
WeightUpdater.update_from_tensor = WeightUpdater.update_weights_from_tensor
del WeightUpdater.update_weights_from_tensor
"""
# SGLang's own caches would go on with its new name, and prefix hits swallow the window.
_RENAMED = """
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
for cls in (BasePrefixCache, UnifiedRadixCache):
    cls.reprefill_tail_tokens = cls.swa_reprefill_tail_tokens
del BasePrefixCache.swa_reprefill_tail_tokens, UnifiedRadixCache.swa_reprefill_tail_tokens
"""
_DROPPED = """
from sglang.srt.plugins.hook_registry import HookRegistry
register = HookRegistry.register
def drop(target, function, kind):
    if not target.endswith("check_decode_capacity"):
        register(target, function, kind)
HookRegistry.register = drop
"""


@pytest.mark.parametrize(
    ("code", "target"),
    [
        pytest.param(
            _RENAMED, "override .*RadixCache.swa_reprefill_tail_tokens has no", id="renamed-method"
        ),
        pytest.param(
            _MISSING,
            "hook .*WeightUpdater.update_weights_from_tensor",
            id="renamed-upstream",
            marks=pytest.mark.sweep,
        ),
        pytest.param(
            _DROPPED, "hook .*check_decode_capacity", id="never-registered", marks=pytest.mark.sweep
        ),
    ],
)
def test_start_stops_with_the_hooks_name(
    tiny_model: Callable[..., Path], tmp_path: Path, code: str, target: str
) -> None:
    """A changed SGLang, as another plugin makes it: no engine, and the log says which hook."""
    # named to come before `fairkv`, should plugins ever be sorted
    folder = install_plugin(tmp_path / "plugin", "changed_sglang", code)
    log = tmp_path / "log"
    with pytest.raises((AssertionError, RuntimeError)):
        EngineProcess(
            tiny_model(**MODEL),
            log,
            fairkv={"ratio": 0.25},
            environment={"PYTHONPATH": str(folder)},
            **ENGINE,
        )
    lines = [line for line in log.read_text().splitlines() if "FairKV cannot run: " in line]
    assert lines and all(
        re.search(target, line) and "it is needed because" in line for line in lines
    )

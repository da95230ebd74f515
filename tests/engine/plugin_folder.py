# SPDX-License-Identifier: Apache-2.0
"""Small SGLang plugins for tests: a folder with a distribution of its own, for ``PYTHONPATH``."""

from __future__ import annotations

from pathlib import Path


def install_plugin(folder: Path, name: str, code: str) -> Path:
    """Write a distribution whose plugin ``name`` runs ``code`` in every rank's process.

    Args:
        folder: What goes onto ``PYTHONPATH``.
        name: Of the distribution, its module and its entry point.
        code: Body of the plugin; ``mark`` says on standard error what the test looks for.

    Returns:
        ``folder``.
    """
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
    body = "".join(f"    {line}\n" for line in code.strip().splitlines())
    (folder / f"{name}.py").write_text(
        "import multiprocessing, sys\n\n"
        "def mark(*words):\n    print('PROBE', *words, file=sys.stderr, flush=True)\n\n"
        "def register():\n"
        "    if multiprocessing.parent_process() is None:\n        return\n" + body
    )
    return folder


PROBE = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
def look(result, scheduler, *args, **kwargs):
    runner = scheduler.tp_worker.model_runner
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    for item in (scheduler.tree_cache, runner.attn_backend, pool, scheduler.req_to_token_pool):
        mark("class", type(item).__module__, type(item).__name__)
    mark("hooks", *sorted(HookRegistry._hooks))
    mark("modules", *sorted(name for name in sys.modules if name.startswith("fairkv_sglang")))
HookRegistry.register(
    "sglang.srt.managers.scheduler.Scheduler.__init__", look, HookType.AFTER
)
"""
"""Says which classes a rank was built from, which hooks are registered, what was imported."""

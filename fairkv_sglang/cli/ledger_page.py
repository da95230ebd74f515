# SPDX-License-Identifier: Apache-2.0
"""The patch ledger as a page: ``docs/patch-ledger.md`` is this text, and a test compares them."""

from __future__ import annotations

from fairkv_sglang.patches.ledger import Hook

_HEAD = """\
# Patch ledger

Every touch on SGLang, made by `fairkv check --ledger --markdown`. Hooks are registered with
SGLang's own hook registry; every rank of a server with FairKV checks that all of FairKV's hooks
took effect and stops, naming the hook, when one did not (`patches/ledger.py`; hooks of the CPU
platform and of measuring are covered by their tests alone). Two of SGLang's registries need no hook
and get an entry each: the prefix cache (`patches/registries.py`) and, on the CPU platform with
FairKV on or off, the torch attention backend (`patches/cpu.py`).
"""


def hook_groups() -> dict[str, tuple[Hook, ...]]:
    """The hooks by the moment at which a process gets them."""
    from fairkv_sglang.patches import all_hooks, cpu, measure
    from fairkv_sglang.patches.server_args import flag_hooks

    return {
        "Every process, FairKV on or off: flags": tuple(flag_hooks()),
        "Every process on the CPU platform": tuple(cpu.HOOKS),
        "Ranks on the CPU platform": tuple(cpu.RANK_HOOKS),
        "Ranks of a server with FairKV": all_hooks(),
        f"Ranks that are measured ({measure.VARIABLE}=1), FairKV on or off": measure.HOOKS,
    }


def ledger_markdown() -> str:
    """The whole page."""
    parts = [_HEAD]
    for title, hooks in hook_groups().items():
        rows = [
            f"| `{hook.target.removeprefix('sglang.srt.')}` | {hook.kind} | {hook.why} | "
            f"{hook.since} | `{hook.upstream}` | `{hook.test}` |"
            for hook in hooks
        ]
        columns = "| target | kind | why | since SGLang | where upstream | test |"
        lines = ["", f"## {title}", "", columns, "|---|---|---|---|---|---|", *rows, ""]
        parts.append("\n".join(lines))
    return "".join(parts)

# SPDX-License-Identifier: Apache-2.0
"""The patch ledger as a page: ``docs/patch-ledger.md`` is this text, and a test compares them."""

from __future__ import annotations

from fairkv_sglang.patches.ledger import Row

_HEAD = """\
# Patch ledger

Every touch on SGLang, made by `fairkv check --ledger --markdown`. Before it serves, each process of
a server with FairKV checks all rows that it has and stops, naming the row, when one does not
hold. Hooks (`before`, `after`, `around`, `replace`) are registered with SGLang's own hook
registry and must be in the function that SGLang now calls (`patches/ledger.py`). Methods that
FairKV's subclasses `override` must still be methods of SGLang's class, with parameters that fit,
and be named where SGLang calls them; so must those of an object for which SGLang has no class
(`interface`; `patches/overrides.py`). Two of SGLang's registries need no hook and get an entry
each: the prefix cache (`patches/registries.py`) and, on the CPU platform with FairKV on or off,
the torch attention backend (`patches/cpu.py`).
"""


def row_groups() -> dict[str, tuple[Row, ...]]:
    """The rows by the moment at which a process gets them."""
    from fairkv_sglang.patches import (
        all_hooks,
        all_overrides,
        cpu,
        cpu_overrides,
        measure,
        no_scheduler,
        processes,
        requests,
        server,
        system_prompt,
        watching,
    )
    from fairkv_sglang.patches.server_args import flag_hooks

    return {
        "Every process, FairKV on or off: flags": tuple(flag_hooks()),
        "Every process that names FairKV, set as its module is imported "
        "(`patches/processes.py`)": processes.EARLY,
        "The process that takes requests, FairKV on": (
            *server.HOOKS,
            *watching.HOOKS,
            *requests.HOOKS,
            *system_prompt.HOOKS,
        ),
        "Every process on the CPU platform": (*cpu.HOOKS, *cpu_overrides()),
        "Ranks on the CPU platform": tuple(cpu.RANK_HOOKS),
        "Ranks of a server with FairKV": (*all_hooks(), *all_overrides()),
        "The same without a scheduler (`sglang.benchmark.one_batch`)": no_scheduler.HOOKS,
        f"Ranks that are measured ({measure.VARIABLE}=1), FairKV on or off": measure.HOOKS,
    }


def ledger_markdown() -> str:
    """The whole page."""
    parts = [_HEAD]
    for title, group in row_groups().items():
        rows = [
            f"| `{row.target.removeprefix('sglang.srt.')}` | {row.kind} | {row.why} | "
            f"{row.since} | `{row.upstream}` | `{row.test}` |"
            for row in group
        ]
        columns = "| target | kind | why | since SGLang | where upstream | test |"
        lines = ["", f"## {title}", "", columns, "|---|---|---|---|---|---|", *rows, ""]
        parts.append("\n".join(lines))
    return "".join(parts)

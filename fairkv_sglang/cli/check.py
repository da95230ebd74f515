# SPDX-License-Identifier: Apache-2.0
"""``fairkv check``: does this installation work, and what would a start do?

Without launch flags it checks the installation, up to a start of a model of two layers. ``fairkv
check LAUNCH FLAGS`` goes through a start as far as the parent process does, without loading a
weight. ``--ledger`` lists every touch on SGLang.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from fairkv_sglang.cli.output import print_json, print_table
from fairkv_sglang.patches import versions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--ledger", action="store_true", help="list every touch on SGLang")
    parser.add_argument("--markdown", action="store_true", help="the ledger as a Markdown page")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.usage = "%(prog)s [--ledger [--markdown]] [--json] [LAUNCH FLAGS]"
    parser.epilog = "With flags of launch.py: what would that start do? They may follow a --."


def take_rest(args: argparse.Namespace, words: list[str]) -> None:
    """Words of another parser: launch flags."""
    args.launch = [word for word in words if word != "--"]


def run(args: argparse.Namespace) -> int:
    """Run the checks up to the first that fails: status 1 if one did.

    Raises:
        ConfigError: for a version of SGLang that is not supported, before anything of it runs.
    """
    versions.check()
    import sglang  # noqa: F401  brings its platform, which must precede its other modules

    if args.ledger:
        _print_ledger(args.json, args.markdown)
        return 0
    if args.launch:
        from fairkv_sglang.cli.preview import preview

        return preview(args.launch, args.json)
    results = list(_results())
    if args.json:
        print_json([{"check": name, "ok": ok, "detail": text} for name, ok, text in results])
    else:
        rows = [[name, "ok" if ok else "FAILED", text] for name, ok, text in results]
        print_table("fairkv check", ["check", "result", "detail"], rows)
    return 0 if all(ok for _, ok, _ in results) else 1


def _results() -> Iterator[tuple[str, bool, str]]:
    """Each check needs what the one before it found in order."""
    for name, check in _CHECKS.items():
        try:
            yield name, True, check()
        except Exception as error:
            yield name, False, " ".join(str(error).split())
            return


def _sglang() -> str:
    return f"{versions.check()}; supported are {versions.OLDEST} to {versions.NEWEST}"


def _plugin() -> str:
    from fairkv_sglang.plugin import check_installation

    check_installation()
    return "SGLang sees the plugin"


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    return f"CPU, torch {torch.__version__}"


def _kernels() -> str:
    import torch

    from fairkv_sglang.attention.decoders import PageTableDecoder
    from fairkv_sglang.attention.warm_up import warm_up
    from fairkv_sglang.budgets.scorers.snapkv import SnapKV
    from fairkv_sglang.kernels import HeadPages

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pages = HeadPages.create(4, 2, 2, 2, 64, dtype, device)
    decoder = PageTableDecoder(pages, (0, 2), pages.kernels.decode)
    seconds = warm_up(pages, decoder, SnapKV(), (0, 2), group=2)
    return f"compiled for {device} in {seconds:.1f} s"


def _hooks() -> str:
    from sglang.srt.plugins.hook_registry import HookRegistry

    from fairkv_sglang.patches import all_hooks, ledger, verify_hooks

    ledger.register(all_hooks())
    HookRegistry.apply_hooks()
    return f"all {len(verify_hooks())} hooks and overridden methods take effect"


def _start() -> str:
    from fairkv_sglang.cli.trial import trial_start

    return trial_start()


_CHECKS: dict[str, Callable[[], str]] = {
    "sglang version": _sglang,
    "plugin": _plugin,
    "device": _device,
    "kernels": _kernels,
    "hooks": _hooks,
    "start": _start,
}


def _print_ledger(as_json: bool, as_markdown: bool) -> None:
    from fairkv_sglang.cli.ledger_page import ledger_markdown, row_groups

    if as_markdown:
        print(ledger_markdown(), end="")
        return
    rows = [
        [row.target.removeprefix("sglang.srt."), row.kind, group, row.since, row.why, row.test]
        for group, part in row_groups().items()
        for row in part
    ]
    columns = ["target", "kind", "group", "since", "why", "test"]
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table("touches on SGLang", columns, rows)

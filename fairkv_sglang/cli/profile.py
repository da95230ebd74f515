# SPDX-License-Identifier: Apache-2.0
"""``fairkv profile``: measure a head profile on your own prompts with the real engine.

The prompts run once through SGLang with FairKV's ``layer`` scope (all heads of a layer compete for
its budget, arXiv 2407.11550); the mean number of tokens that each head kept is its share.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.cli.output import print_json, print_table, progress
from fairkv_sglang.profiles import HeadProfile

BATCH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--model-path", required=True, help="checkpoint, as for SGLang")
    parser.add_argument(
        "--prompts",
        required=True,
        type=Path,
        metavar="FILE",
        help='one prompt per line: plain text, or JSON with "text" or "input_ids"',
    )
    parser.add_argument("--out", required=True, type=Path, help="profile (.json or .safetensors)")
    parser.add_argument("--limit", type=int, help="use the first LIMIT prompts only")
    parser.add_argument("--tp-size", type=int, default=1, help="tensor-parallel ranks (default 1)")
    parser.add_argument("--ratio", type=float, default=0.25, help="budget as a share of the prompt")
    parser.add_argument("--scorer", default="snapkv", help="scorer (default snapkv)")
    parser.add_argument("--window", type=int, default=32, help="observation window in tokens")
    parser.add_argument("--kernel-size", type=int, default=7, help="snapkv: pooling width (odd)")
    parser.add_argument(
        "--max-total-tokens", type=int, help="KV memory in tokens (needed on CPU, default 65536)"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the shares")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, save, print."""
    prompts = read_prompts(args.prompts)[: args.limit]
    if not prompts:
        raise ValueError(f"{args.prompts} has no prompt; give one prompt per line")
    state = _measure(args, prompts)
    kept = state["kept"]
    tokens = np.asarray(kept["tokens"], dtype=np.float64)
    profile = HeadProfile(
        model=str(args.model_path),
        shares=tokens,
        meta={
            "source": "fairkv profile",
            "scorer": args.scorer,
            "scope": "layer",
            "ratio": args.ratio,
            "window": args.window,
            "kernel_size": args.kernel_size,
            "prompts": kept["prompts"],
            "mean_prompt_tokens": kept["prompt_tokens"] / kept["prompts"],
        },
    )
    profile.save(args.out)
    if args.plot is not None:
        from fairkv_sglang.profiles.plot import draw

        draw(profile, args.plot)
    relative = profile.relative
    summary = {
        "out": str(args.out),
        "layers": profile.num_layers,
        "kv_heads": profile.num_kv_heads,
        "prompts": kept["prompts"],
        "mean_prompt_tokens": kept["prompt_tokens"] / kept["prompts"],
        "largest_share_over_mean": float(relative.max()),
        "smallest_share_over_mean": float(relative.min()),
    }
    if args.json:
        print_json(summary)
    else:
        rows = [[str(i), *(f"{x:.2f}" for x in row)] for i, row in enumerate(relative)]
        columns = ["layer", *(f"h{i}" for i in range(profile.num_kv_heads))]
        print_table("kept tokens of each head over the mean head", columns, rows)
        print(f"{kept['prompts']} prompts -> {args.out}")
    return 0


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Prompts of a file, each as ``{"text": ...}`` or ``{"input_ids": [...]}``.

    Raises:
        ValueError: in one line, naming file and line.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    prompts: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            prompts.append({"text": line})
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        known = [key for key in ("text", "input_ids") if key in entry]
        if len(known) != 1:
            raise ValueError(f'{path}, line {number}: give either "text" or "input_ids"')
        prompts.append({known[0]: entry[known[0]]})
    return prompts


def _measure(args: argparse.Namespace, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    from fairkv_sglang.engine import Engine

    arguments: dict[str, Any] = {
        "model_path": args.model_path,
        "tp_size": args.tp_size,
        "log_level": "warning",
        # A cached prompt would be counted all the same, but measured on fewer queries.
        "disable_radix_cache": True,
    }
    if args.max_total_tokens or not torch.cuda.is_available():
        arguments["max_total_tokens"] = args.max_total_tokens or 65536
    fairkv = {
        "ratio": args.ratio,
        "scope": "layer",
        "scorer": args.scorer,
        "window": args.window,
        "kernel_size": args.kernel_size,
        "placement": "contiguous",
    }
    engine = Engine(fairkv=fairkv, **arguments)
    try:
        with progress("prompts", len(prompts)) as advance:
            for start in range(0, len(prompts), BATCH):
                batch = prompts[start : start + BATCH]
                # Two tokens: a request that ends with its first token never settles its counts.
                sampling = {"max_new_tokens": 2, "ignore_eos": True, "temperature": 0.0}
                for prompt in _by_kind(batch):
                    engine.generate(**prompt, sampling_params=sampling)
                for _ in batch:
                    advance()
        state: dict[str, Any] = engine.get_server_info()["internal_states"][0]["fairkv"]
        return state
    finally:
        engine.shutdown()


def _by_kind(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    texts = [entry["text"] for entry in batch if "text" in entry]
    ids = [entry["input_ids"] for entry in batch if "input_ids" in entry]
    calls: list[dict[str, Any]] = []
    if texts:
        calls.append({"prompt": texts})
    if ids:
        calls.append({"input_ids": ids})
    return calls

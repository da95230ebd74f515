# SPDX-License-Identifier: Apache-2.0
"""``fairkv profile``: a head profile from your own prompts, or from a running server's traffic.

With ``--prompts`` they run once through SGLang with FairKV's ``layer`` scope (all heads of a layer
compete for its budget, arXiv 2407.11550); the mean number of tokens that each head kept is its
share. With ``--url`` the same counts are read from a server that has been serving with FairKV.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.cli.output import PICTURES, check_output, print_json, print_table, progress
from fairkv_sglang.cli.remote import add_url_flags, checked_url, fairkv_states, server_info
from fairkv_sglang.model import DTYPE_BYTES
from fairkv_sglang.profiles import HeadProfile

BATCH = 16
PROFILES = (".json", ".safetensors")
# Flags of a measurement and their defaults; a running server has its own.
_MEASURING: dict[str, Any] = {
    "model_path": None,
    "prompts": None,
    "limit": None,
    "tp_size": 1,
    "ratio": 0.25,
    "scorer": "snapkv",
    "window": 32,
    "kernel_size": None,
    "max_total_tokens": None,
    "device": None,
    "dtype": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--out", required=True, type=Path, help="profile (.json or .safetensors)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the shares")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    served = parser.add_argument_group("from a running server")
    add_url_flags(served, required=False)
    own = parser.add_argument_group("by running prompts")
    own.add_argument("--model-path", help="checkpoint, as for SGLang")
    own.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='one prompt per line: plain text, or JSON with "text" or "input_ids"',
    )
    own.add_argument("--limit", type=int, help="use the first LIMIT prompts only")
    own.add_argument("--tp-size", type=int, help="tensor-parallel ranks (default 1)")
    own.add_argument("--ratio", type=float, help="budget as a share of the prompt (default 0.25)")
    own.add_argument("--scorer", help="scorer (default snapkv)")
    own.add_argument("--window", type=int, help="observation window in tokens (default 32)")
    own.add_argument("--kernel-size", type=int, help="snapkv: pooling width, odd")
    own.add_argument(
        "--max-total-tokens", type=int, help="KV memory in tokens (needed on CPU, default 65536)"
    )
    own.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    own.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="default: the checkpoint's")
    parser.set_defaults(**_MEASURING)


def run(args: argparse.Namespace) -> int:
    """Measure or ask, save, print."""
    check_output(args.out, PROFILES)
    if args.plot is not None:
        check_output(args.plot, PICTURES)
    profile = _from_server(args) if args.url is not None else _from_prompts(args)
    profile.save(args.out)
    if args.plot is not None:
        from fairkv_sglang.profiles.profile_picture import draw

        draw(profile, args.plot)
    relative = profile.relative
    summary = {
        "out": str(args.out),
        "layers": profile.num_layers,
        "kv_heads": profile.num_kv_heads,
        "prompts": profile.meta["prompts"],
        "mean_prompt_tokens": profile.meta["mean_prompt_tokens"],
        "largest_share_over_mean": float(relative.max()),
        "smallest_share_over_mean": float(relative.min()),
    }
    if args.json:
        print_json(summary)
    else:
        rows = [[str(i), *(f"{x:.2f}" for x in row)] for i, row in enumerate(relative)]
        columns = ["layer", *(f"h{i}" for i in range(profile.num_kv_heads))]
        print_table("kept tokens of each head over the mean head", columns, rows)
        print(f"{profile.meta['prompts']} prompts -> {args.out}")
    return 0


def _from_server(args: argparse.Namespace) -> HeadProfile:
    for name, default in _MEASURING.items():
        if getattr(args, name) != default:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is for measuring on prompts; with --url leave it out")
    info = server_info(args.url, args.api_key)
    states = fairkv_states(info, args.url)
    state, url = states[0], checked_url(args.url)
    kept: dict[str, Any] = {}
    for replica in states:
        last = replica.get("traffic")  # the last prompts: a profile is of one kind of traffic
        if not isinstance(last, dict) or not {"prompts", "prompt_tokens", "tokens"} <= last.keys():
            raise ValueError(f"{url} does not say what its heads kept: another version of FairKV?")
        for name in ("prompts", "prompt_tokens", "tokens"):
            kept[name] = (np.asarray(kept.get(name, 0)) + np.asarray(last[name])).tolist()
    if not kept["prompts"]:
        raise ValueError(f"{url} has compressed no prompt yet: send it some of your traffic first")
    known = ("scorer", "scope", "budget", "version")
    return _profile(
        info.get("model_path") or info.get("served_model_name"),
        kept,
        {
            "source": "fairkv profile --url",
            **{key: state[key] for key in known if key in state},
            **state.get("options", {}),
        },
    )


def _from_prompts(args: argparse.Namespace) -> HeadProfile:
    if args.model_path is None or args.prompts is None:
        raise ValueError("give --model-path and --prompts, or --url of a running server")
    prompts = read_prompts(args.prompts)[: args.limit]
    if not prompts:
        raise ValueError(f"{args.prompts} has no prompt; give one prompt per line")
    meta = {
        "source": "fairkv profile",
        "scorer": args.scorer,
        "scope": "layer",
        "ratio": args.ratio,
    }
    state = _measure(args, prompts)
    return _profile(str(args.model_path), state["kept"], {**meta, **state["options"]})


def _profile(model: str | None, kept: dict[str, Any], meta: dict[str, Any]) -> HeadProfile:
    """A profile of ``kept``, the sums over prompts that a server reports."""
    prompts = kept["prompts"]
    means = {"prompts": prompts, "mean_prompt_tokens": kept["prompt_tokens"] / prompts}
    tokens = np.asarray(kept["tokens"], dtype=np.float64)
    return HeadProfile(model=model, shares=tokens, meta={**meta, **means})


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
        **{key: value for key in ("device", "dtype") if (value := getattr(args, key))},
    }
    if args.max_total_tokens or not torch.cuda.is_available():
        arguments["max_total_tokens"] = args.max_total_tokens or 65536
    fairkv = {
        "ratio": args.ratio,
        "scope": "layer",
        "scorer": args.scorer,
        "window": args.window,
        "placement": "contiguous",
    }
    if args.kernel_size is not None:
        fairkv["kernel_size"] = args.kernel_size
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

# SPDX-License-Identifier: Apache-2.0
"""``fairkv eval``: what compression does to answers, on any server with OpenAI's API."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from fairkv_sglang.cli.output import PICTURES, check_output, print_json, print_table, progress
from fairkv_sglang.cli.remote import add_url_flags, checked_url
from fairkv_sglang.evaluation.client import Client, Mode, Prompts, post
from fairkv_sglang.evaluation.run import read
from fairkv_sglang.evaluation.run import run as ask_all
from fairkv_sglang.evaluation.summary import summarise, table
from fairkv_sglang.evaluation.tasks import TASKS, Sample, make_samples, read_samples

MODES: tuple[Mode, ...] = ("aware", "agnostic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the sub-command."""
    add_url_flags(parser, required=True)
    for flag, default, text in (
        ("--tasks", ",".join(TASKS), "of %(default)s; default all"),
        ("--lengths", "1024,4096", "tokens of a context; default %(default)s"),
        ("--modes", ",".join(MODES), "aware: the question ends the prompt; agnostic: it comes "
         "after compression; default both"),
        ("--samples", 50, "questions of each task and length; default %(default)s"),
        ("--seed", 0, "decides all texts; default %(default)s"),
        ("--parallel", 8, "contexts at once; default %(default)s"),
        ("--top", 5, "most probable tokens to compare, 0: none; default %(default)s"),
        ("--model", None, "the model's name at the server; default its first"),
        ("--options", None, 'FairKV\'s options of each request as JSON, e.g. \'{"ratio": 0.25}\''),
        ("--tokenizer", None, "folder of the tokenizer; default the server's, if it is here"),
    ):  # fmt: skip
        kind = type(default) if isinstance(default, int) else str
        parser.add_argument(flag, type=kind, default=default, metavar="X", help=text)
    for flag, text in (
        ("--out", "answers, a line each (.jsonl); if it is there, the run goes on"),
        ("--baseline", "answers of another run, mostly of the full cache, to compare with"),
        ("--own", "own samples: lines with context, question and checks [[kind, value]]"),
        ("--plot", "also draw the result (.png)"),
    ):
        parser.add_argument(flag, type=Path, metavar="FILE", required=flag == "--out", help=text)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Ask, compare, print."""
    check_output(args.out, (".jsonl",))
    if args.plot is not None:
        check_output(args.plot, PICTURES)
    if args.samples < 1 or args.parallel < 1 or args.top < 0:
        raise ValueError("--samples and --parallel must be at least 1, --top at least 0")
    modes = [_one_of("mode", word, MODES) for word in args.modes.split(",")]
    before, baseline = ({}, None) if args.baseline is None else read(args.baseline)
    client, server, options = _client(args)
    samples = _samples(args, client.prompts)
    settings = _settings(args, client.model, server, options)
    if baseline is not None and any(before.get(k) != settings.get(k) for k in ("seed", "own")):
        raise ValueError(
            f"{args.baseline} has answers to other questions: give both runs the same --seed and "
            "--own"
        )
    with progress("questions", len(samples) * len(modes)) as advance:
        records = ask_all(client, samples, modes, args.out, settings, args.parallel, advance)
    cells = summarise(records, baseline)
    if args.plot is not None:
        from fairkv_sglang.evaluation.picture import draw

        runs = {args.out.stem: cells}
        if baseline is not None:
            runs = {args.baseline.stem: summarise(baseline), **runs}
        draw(runs, args.plot)
    if args.json:
        print_json({"server": server, "cells": cells})
    else:
        print_table(f"{client.model}: {server}", *table(cells))
    return 0


def _settings(
    args: argparse.Namespace, model: str, server: str, options: dict[str, Any]
) -> dict[str, Any]:
    """What decides a run's answers: a file holds those of one run."""
    settings = {"seed": args.seed, "top": args.top, "model": model, "server": server, **options}
    if args.own is not None:
        settings["own"] = hashlib.sha256(args.own.read_bytes()).hexdigest()
    return settings


def _client(args: argparse.Namespace) -> tuple[Client, str, dict[str, Any]]:
    """The server as it says it is, FairKV's settings or that it has none; its other settings."""
    url = checked_url(args.url).removesuffix("/v1")
    model = args.model or post(f"{url}/v1/models", None, args.api_key)["data"][0]["id"]
    try:
        info = post(f"{url}/server_info", None, args.api_key)
    except ValueError:  # not SGLang's
        info = {}
    states = info.get("internal_states") or [{}]
    state = states[0].get("fairkv") or {}
    if state and not info.get("enable_custom_logit_processor") and "agnostic" in args.modes:
        raise ValueError(
            "query-agnostic questions need a server started with --enable-custom-logit-processor; "
            "or give --modes aware"
        )
    name = args.tokenizer or info.get("tokenizer_path") or model
    try:
        prompts = Prompts(_tokenizer(name))
    except (OSError, ValueError) as error:
        why = (str(error).splitlines() or ["no such file"])[0]
        raise ValueError(f"no tokenizer in {name} ({why}): give --tokenizer DIR") from None
    asked = _request_options(args.options)
    if asked and not state:
        raise ValueError("--options are for a server with FairKV, which this one is without")
    client = Client(url, model, prompts, args.api_key, bool(state), args.top, asked)
    said = [str(state[key]) for key in ("scorer", "scope", "budget") if key in state]
    said += [f"{key} {value} in requests" for key, value in asked.items()]
    options = {key: state[key] for key in ("options", "profile") if state.get(key)}
    return client, "FairKV " + ", ".join(said) if state else "full cache", options


def _request_options(text: str | None) -> dict[str, Any]:
    try:
        options = json.loads(text or "{}")
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"""--options {text}: give JSON, e.g. '{{"ratio": 0.25}}'""")
    return options


def _tokenizer(name: str) -> Any:
    from fairkv_sglang.torchvision_finder import make_torchvision_importable

    make_torchvision_importable()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _samples(args: argparse.Namespace, prompts: Prompts) -> list[Sample]:
    if args.own is not None:
        if not args.own.is_file():
            raise ValueError(f"there is no file {args.own}")
        own = list(read_samples(args.own))
        if not own:
            raise ValueError(f"there are no samples in {args.own}")
        return own
    tasks = [_one_of("task", word, tuple(TASKS)) for word in args.tasks.split(",")]
    if not all(word.isdecimal() and int(word) for word in args.lengths.split(",")):
        raise ValueError(f"--lengths {args.lengths}: give numbers of tokens, e.g. 1024,4096")
    lengths = [int(word) for word in args.lengths.split(",")]
    return [
        sample
        for task in tasks
        for tokens in lengths
        for sample in make_samples(task, args.seed, tokens, args.samples, prompts.count)
    ]


def _one_of(what: str, word: str, known: tuple[Any, ...]) -> Any:
    if word.strip() not in known:
        raise ValueError(f"there is no {what} {word.strip()!r}: choose from {', '.join(known)}")
    return word.strip()

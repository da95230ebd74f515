# SPDX-License-Identifier: Apache-2.0
"""The score above which a server keeps a given share of its prompts, for ``bench/accuracy.py``.

With scope ``threshold`` memory follows from the prompts. To stand in a column with methods that
keep a fixed share, the threshold is the one that keeps this share of other prompts of the same
kind; what the questions themselves then keep is measured and stands in the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairkv_sglang.evaluation.client import post

CAP = 0.99
"""Most that a head may keep, as a share: with a budget of the whole prompt nothing is cut."""
STEPS = 40
"""Halvings of the range; each asks the server once."""
SMALLEST, DOUBLINGS = 1e-7, 60
"""Size of the thresholds that are tried: from nearly 0 to about ``SMALLEST * 2**DOUBLINGS``."""
NEAR = 0.01
"""Relative difference to the wanted share that is small enough."""


def options_above(scorer: str, threshold: float) -> dict[str, Any]:
    """Options of a request: all that scores above the value, nothing else but the window."""
    options = {"scorer": scorer, "scope": "threshold", "threshold": threshold}
    return {**options, "floor_alpha": 0.0, "ratio": CAP}


def kept(url: str) -> tuple[int, int]:
    """Tokens that a server's heads have kept so far, and those that they were given."""
    state = post(url + "/server_info", None)["internal_states"][0]["fairkv"]["kept"]
    heads = sum(map(len, state["tokens"]))
    return sum(map(sum, state["tokens"])), state["prompt_tokens"] * heads


def kept_since(url: str, before: tuple[int, int]) -> float | None:
    """The share kept of what came after ``before``; None if nothing did."""
    now = kept(url)
    given = now[1] - before[1]
    return (now[0] - before[0]) / given if given else None


def find_threshold(share_above: Callable[[float], float], wanted: float) -> float:
    """The threshold that keeps nearly the share that is wanted.

    Args:
        share_above: Share of tokens that score above a value; falls as the value rises.
        wanted: Share to keep.

    Returns:
        Within ``NEAR`` of it where scores allow that; else the nearest that was tried.
    """
    low, high, best = -float(DOUBLINGS), float(DOUBLINGS), (math.inf, 0.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        threshold = _value(middle)
        share = share_above(threshold)
        best = min(best, (abs(share / wanted - 1), threshold))
        if best[0] <= NEAR:
            break
        low, high = (middle, high) if share > wanted else (low, middle)
    return best[1]


def _value(position: float) -> float:
    """From a line on which every size of number has the same room, to numbers."""
    return math.copysign(SMALLEST * (2.0 ** abs(position) - 1), position)


def calibrated(url: str, scorer: str, wanted: float, prompts: list[list[int]], file: Path) -> float:
    """The threshold for a scorer and share, from ``file`` if it was found before.

    Args:
        url: A server with FairKV.
        scorer: Name.
        wanted: Share of the prompts to keep.
        prompts: Token ids, not those of the questions.
        file: JSON; the threshold is added.
    """
    known = json.loads(file.read_text()) if file.exists() else {}
    name = f"{scorer}-{wanted:g}"
    if name not in known:

        def share_above(threshold: float) -> float:
            before = kept(url)
            sampling = {
                "temperature": 0,
                "max_new_tokens": 2,  # with one the prompt is never compressed
                "custom_params": {"fairkv": options_above(scorer, threshold)},
            }
            post(
                url + "/generate", {"input_ids": prompts, "sampling_params": sampling}, timeout=900
            )
            share = kept_since(url, before)
            if share is None:
                raise SystemExit(f"{url} has compressed no prompt")
            return share

        known[name] = find_threshold(share_above, wanted)
        file.write_text(json.dumps(known, indent=1) + "\n")
    return float(known[name])

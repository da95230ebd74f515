# SPDX-License-Identifier: Apache-2.0
"""Tab-separated tables of numbers, shared by the readers, and the two-class rule for heads."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from fairkv_sglang.profiles.head_profile import FloatArray


def read_table(path: Path) -> FloatArray:
    """[L, H] float64 from a TSV file; lines that start with # are comments."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty file is reported below
            table = np.loadtxt(path, dtype=np.float64, delimiter="\t", ndmin=2)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ValueError(f"not a table of tab-separated numbers ({error})") from None
    if table.size == 0:
        raise ValueError("the table is empty")
    if not np.isfinite(table).all():
        layer, head = np.argwhere(~np.isfinite(table))[0]
        raise ValueError(f"number of layer {layer}, head {head} is {table[layer, head]}")
    return table


def layer_comment(path: Path) -> list[int] | None:
    """Physical layer ids of a leading ``# layers: 5,11,17`` line; None if there is none."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
    if not first.startswith("# layers:"):
        return None
    try:
        return [int(word) for word in first.removeprefix("# layers:").split(",")]
    except ValueError:
        raise ValueError(f"cannot read the layer ids in {first.strip()!r}") from None


def two_class_tokens(score: FloatArray, full: int, context_length: int, rest: int) -> FloatArray:
    """Tokens per head when the ``full`` best heads keep everything and the others ``rest`` tokens.

    Equal scores are resolved by the lower layer, then the lower head, so that the result is the
    same everywhere (upstream adds random noise instead).
    """
    tokens = np.full(score.size, float(min(rest, context_length)))
    tokens[np.argsort(-score.ravel(), kind="stable")[:full]] = context_length
    return tokens.reshape(score.shape)


def require_positive(**values: int) -> None:
    """ValueError naming the first value that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def require_fraction(**values: float) -> None:
    """ValueError naming the first value outside [0, 1]."""
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie between 0 and 1, not {value}")

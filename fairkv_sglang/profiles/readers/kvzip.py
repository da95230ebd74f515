# SPDX-License-Identifier: Apache-2.0
"""KVzip (arXiv 2505.23416), head level: heads above a threshold keep everything."""

from __future__ import annotations

import math
from pathlib import Path

from fairkv_sglang.profiles.head_profile import HeadProfile
from fairkv_sglang.profiles.readers.table import (
    read_table,
    require_fraction,
    require_positive,
    two_class_tokens,
)


def read(
    path: Path, context_length: int = 32768, ratio: float = 0.6, sink: int = 0, recent: int = 32
) -> HeadProfile:
    """Head scores to expected tokens.

    Args:
        path: Table of head scores (maximum reconstruction score over the context), rows = layers.
        context_length: Prompt tokens for which the profile is meant.
        ratio: Share of the heads, best first, that keep the whole context; upstream recommends 0.6.
        sink, recent: Tokens that the other heads keep.
    """
    require_positive(context_length=context_length, recent=recent)
    require_fraction(ratio=ratio)
    score = read_table(path)
    full = math.ceil(ratio * score.size - 1e-9)
    meta = {
        "source": "https://github.com/snu-mllab/KVzip",
        "licence": "MIT",
        "scorer": "kvzip, head level",
        "context_length": context_length,
        "ratio": ratio,
        "sink": sink,
        "recent": recent,
    }
    tokens = two_class_tokens(score, full, context_length, sink + recent)
    return HeadProfile(path.absolute().parent.name or None, tokens, meta)

# SPDX-License-Identifier: Apache-2.0
"""DuoAttention (arXiv 2410.10819): a trained gate per KV head, high = needs the whole cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fairkv_sglang.profiles.head_profile import HeadProfile, read_json
from fairkv_sglang.profiles.readers.table import (
    read_table,
    require_fraction,
    require_positive,
    two_class_tokens,
)

FILE_NAME = "full_attention_heads.tsv"


def read(
    path: Path,
    context_length: int = 32768,
    sparsity: float = 0.5,
    sink: int = 64,
    recent: int = 256,
) -> HeadProfile:
    """Gates to expected tokens, as upstream deploys them.

    The gates are clipped to [0, 1]; the share ``sparsity`` of the heads with the lowest gates
    stream (``sink + recent`` tokens), all others keep the whole context.

    Args:
        path: The table (rows = layers), or the folder that holds it and its config.json.
        context_length: Prompt tokens for which the profile is meant.
        sparsity: Share of streaming heads; upstream 0.5 for GQA models, 0.75 without GQA.
        sink, recent: Tokens of a streaming head; upstream deploys 64 and 256.
    """
    require_positive(context_length=context_length, recent=recent)
    require_fraction(sparsity=sparsity)
    table = path / FILE_NAME if path.is_dir() else path
    config_path = table.parent / "config.json"
    config = read_json(config_path) if config_path.exists() else {}
    gates = np.clip(read_table(table), 0.0, 1.0)
    streaming = round(sparsity * gates.size)
    tokens = two_class_tokens(gates, gates.size - streaming, context_length, sink + recent)
    name = config.get("model_name")
    meta = {
        "source": "https://github.com/mit-han-lab/duo-attention",
        "licence": "MIT",
        "scorer": "duo-attention",
        "context_length": context_length,
        "sparsity": sparsity,
        "sink": sink,
        "recent": recent,
    }
    return HeadProfile(str(name).removeprefix("models/") if name else None, tokens, meta)

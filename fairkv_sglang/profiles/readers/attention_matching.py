# SPDX-License-Identifier: Apache-2.0
"""attention-matching (github.com/adamzweiger/compaction): optimised budget share per head."""

from __future__ import annotations

from pathlib import Path

from fairkv_sglang.profiles.head_profile import HeadProfile
from fairkv_sglang.profiles.readers.table import layer_comment, read_table


def read(path: Path) -> HeadProfile:
    """The table as it stands: it sums to 1 over all heads.

    A first line ``# layers: 5,11,...`` lists the physical layers of the rows when a model's
    sliding-window layers are left out; they are kept as ``meta["layers"]``.
    """
    table = read_table(path)
    if abs(table.sum() - 1.0) > 1e-2:
        raise ValueError(f"the shares sum to {table.sum():.6g}, expected 1")
    meta: dict[str, object] = {
        "source": "https://github.com/adamzweiger/compaction",
        "licence": "MIT",
        "scorer": f"attention-matching, {path.stem}",
    }
    layers = layer_comment(path)
    if layers is not None:
        if len(layers) != len(table):
            raise ValueError(f"lists {len(layers)} layers but has {len(table)} rows")
        meta["layers"] = layers
    return HeadProfile(path.absolute().parent.name or None, table, meta)

# SPDX-License-Identifier: Apache-2.0
"""What ranks on one machine share."""

from __future__ import annotations

import pytest

from fairkv_sglang.cpu_environment import memory_per_rank


@pytest.mark.parametrize(
    ("node", "nodes", "ranks", "each"),
    [
        (24.0, 1, 1, 24.0),
        (24.0, 1, 4, 6.0),  # was 24 for each of the four
        (12.0, 2, 2, 12.0),
        (12.0, 2, 4, 6.0),
        (12.0, 2, 1, 12.0),
    ],
)
def test_ranks_share_the_memory_that_is_there(
    node: float, nodes: int, ranks: int, each: float
) -> None:
    assert memory_per_rank(node, nodes, ranks) == each
    assert ranks * each <= nodes * node

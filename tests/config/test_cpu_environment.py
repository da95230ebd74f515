# SPDX-License-Identifier: Apache-2.0
"""What ranks on one machine share."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from fairkv_sglang.cpu_environment import all_ranks, memory_per_rank, prepare_threads, ranks_here


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


@pytest.mark.parametrize(
    ("parallel", "everywhere", "here"),
    [
        ({"tp_size": 4}, 4, 4),
        ({"tp_size": 4, "nnodes": 2}, 4, 2),
        ({"tp_size": 2, "dp_size": 3}, 6, 6),
        ({"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}, 4, 4),  # parts of the four
        ({"tp_size": 2, "pp_size": 2, "nnodes": 2}, 4, 2),
    ],
)
def test_ranks_of_a_machine(parallel: dict[str, int], everywhere: int, here: int) -> None:
    alone = {"tp_size": 1, "pp_size": 1, "dp_size": 1, "nnodes": 1, "enable_dp_attention": False}
    arguments = SimpleNamespace(**{**alone, **parallel})
    assert (all_ranks(arguments), ranks_here(arguments)) == (everywhere, here)


def test_cores_are_dealt_to_the_ranks_of_this_machine() -> None:
    """SGLang asks for them whenever a server has several ranks, wherever they are."""
    cores = sorted(os.sched_getaffinity(0))
    environment: dict[str, str] = {}
    prepare_threads(1, 1, environment)
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in environment
    prepare_threads(1, 2, environment)
    assert environment["SGLANG_CPU_OMP_THREADS_BIND"] == ",".join(map(str, cores))

# SPDX-License-Identifier: Apache-2.0
"""Ranks on several machines agree on the plan before they load a model."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any, NoReturn

import torch

from fairkv_sglang.nodes import difference, given
from fairkv_sglang.patches.watching import DISAGREED
from fairkv_sglang.placement import Plan
from fairkv_sglang.planning import Start

WAIT_SECONDS = 60.0
"""For the ranks of all nodes, which come here together, behind SGLang's own rendezvous."""


def agreed_plan(start: Start, group: Any, node: int) -> Plan:
    """The plan of node 0, when all nodes were given the same; every rank calls this.

    Nodes plan for themselves, and machines may differ in the last bit of a sum; so what was given
    is compared, not what came out. A difference ends the process with status 2 and one line.

    Args:
        start: What this node's parent has made.
        group: SGLang's tensor-parallel group.
        node: This node's number.
    """
    try:
        torch.distributed.monitored_barrier(group.cpu_group, timedelta(seconds=WAIT_SECONDS))
    except RuntimeError:
        _exit(
            f"node {node} waited {WAIT_SECONDS:g} s for the other nodes to compare their FairKV "
            "flags: start every node with --fairkv"
        )
    mine = {
        "node": node,
        "given": given(start.config),
        "plan": start.plan.to_json() if group.rank_in_group == 0 else None,
    }
    told: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(told, mine, group=group.cpu_group)
    wrong = difference({each["node"]: each["given"] for each in told})
    if wrong is not None:
        _exit(wrong)
    return Plan.from_json(told[0]["plan"])


def _exit(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(DISAGREED)

# SPDX-License-Identifier: Apache-2.0
"""What a process needs before SGLang runs on a plain CPU: thread settings, and memory by rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any


def has_accelerator() -> bool:
    """True if torch sees a device that SGLang serves by itself (imports torch)."""
    import torch

    return bool(torch.cuda.is_available() or torch.xpu.is_available() or hasattr(torch, "npu"))


def all_ranks(parallel: Any) -> int:
    """Ranks of a server, over all replicas and machines.

    Args:
        parallel: Anything with SGLang's names: its server arguments, or its view of a rank's.
    """
    replicas = 1 if parallel.enable_dp_attention else parallel.dp_size
    return int(parallel.tp_size * (parallel.pp_size or 1) * (replicas or 1))


def ranks_here(parallel: Any) -> int:
    """Those on this machine; ``parallel`` as for :func:`all_ranks`."""
    return max(1, all_ranks(parallel) // (parallel.nnodes or 1))


def prepare_threads(
    here: int, ranks: int, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Set the thread variables that SGLang's CPU ranks need; what the user has set stays.

    The ranks are new processes, so this works until the moment they are started:

    - ``OMP_NUM_THREADS=1``: several ranks on few cores otherwise spend their time in spinning
      worker threads (TP 2 on 2 cores: 15 against 59 tokens/s).
    - ``TORCHDYNAMO_DISABLE=1``: the mask of the vocabulary-parallel embedding is a compiled
      function; compiling needs a C++ compiler and seconds on the first batch.
    - ``SGLANG_CPU_OMP_THREADS_BIND``: SGLang binds a rank to a NUMA node and stops when there are
      more ranks than nodes, unless every rank is given its cores. Ranks take turns when there are
      more ranks than cores.

    Args:
        here: Ranks on this machine.
        ranks: Ranks on all machines, which SGLang compares with the NUMA nodes of this one.
        environment: Where to set the variables.
    """
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("TORCHDYNAMO_DISABLE", "1")
    if ranks > 1:
        environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", thread_binding(here))


def memory_per_rank(of_a_node: float, nodes: int, ranks: int) -> float:
    """Memory that a rank may count with, where all ranks share what the nodes have.

    SGLang gives each rank a node's, however many ranks there are.

    Args:
        of_a_node: Memory of a NUMA node, in any unit.
        nodes: Number of NUMA nodes of this machine.
        ranks: Number of ranks on them.
    """
    return of_a_node * min(1.0, nodes / ranks)


def yield_to_gloo_workers() -> int:
    """Keep gloo's network threads of this process from interrupting its worker threads.

    A worker sends while it holds its connection's lock, the send wakes the network thread of the
    other side, and that of its own side for the answer. Where the cores are taken, the scheduler
    lets the thread that woke up run first: it finds the lock taken, polls until its time slice is
    over, and the collective takes milliseconds. Under Linux's batch policy a thread that wakes up
    waits for its turn. Its share of the processor stays the same. At TP 2 on 2 cores an all-reduce
    of 12 kB takes 0.2 ms instead of 1.7 (docs/performance.md).

    To be called in each rank when its process groups exist.

    Returns:
        Number of threads changed; 0 where the system has no such policy or forbids it.
    """
    tasks = Path("/proc/self/task")
    if not hasattr(os, "SCHED_BATCH") or not tasks.is_dir():
        return 0
    changed = 0
    for task in tasks.iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended, or a sandbox
            if (task / "comm").read_text().startswith("gloo_tcp_loop"):
                os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))
                changed += 1
    return changed


def thread_binding(ranks: int, cores: Sequence[int] | None = None) -> str:
    """Cores of each rank in SGLang's notation, e.g. ``"0,1|2,3"``.

    Args:
        ranks: Number of ranks on this machine.
        cores: Core numbers to deal out; those this process may use if None.
    """
    cores = sorted(os.sched_getaffinity(0)) if cores is None else cores
    if len(cores) < ranks:
        groups: list[Sequence[int]] = [[cores[rank % len(cores)]] for rank in range(ranks)]
    else:
        each = len(cores) // ranks
        groups = [cores[rank * each : (rank + 1) * each] for rank in range(ranks)]
    return "|".join(",".join(str(core) for core in group) for group in groups)

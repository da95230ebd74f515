# SPDX-License-Identifier: Apache-2.0
"""Hooks for ranks that SGLang does not watch: those of a node without HTTP server, and those of
data-parallel replicas.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing import connection
from typing import Any

import psutil  # type: ignore[import-untyped]

from fairkv_sglang.config import from_environment
from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.patches.server import obituaries

logger = logging.getLogger(__name__)

DISAGREED = 2
"""Status of a rank whose node was given something else than another."""
STATUS_SECONDS = 1.0
"""Until processes that end together have all ended."""


def after_launch_schedulers(result: Any, *args: Any, **kwargs: Any) -> Any:
    """A node without HTTP server waits for its ranks in a way of FairKV's.

    Nodes that do not agree (``nodes.py``) end with the line that their ranks have written.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    started, processes = result
    if parallel.nnodes == 1 or not processes:
        return result
    wait_for_ready = started.wait_for_ready

    def wait_for_agreement() -> None:
        try:
            wait_for_ready()
        except RuntimeError:
            if any(process.exitcode == DISAGREED for process in processes):
                raise SystemExit(DISAGREED) from None
            raise

    started.wait_for_ready = wait_for_agreement
    if parallel.node_rank >= 1:
        first = parallel.node_rank * len(processes)
        names = [f"scheduler_{first + i}" for i in range(len(processes))]
        started.block_until_scheduler_exits = lambda: _wait(processes, names, parallel.node_rank)
    return result


def _wait(processes: Sequence[Any], names: Sequence[str], node: int) -> None:
    """Until node 0 has ended this node's ranks; status 1 if one of them failed."""
    from sglang.srt.utils import kill_process_tree

    def interrupted(*_: Any) -> None:
        logger.warning(
            "FairKV: Ctrl-C: node %d ends when node 0 does; Ctrl-C again ends it now, and the "
            "server with it",
            node,
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def rank_failed(*_: Any) -> None:  # it tells its parent, and may take long to end
        raise ChildProcessError

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupted)
        signal.signal(signal.SIGQUIT, rank_failed)
    try:
        failed = _first_failure(processes)
    except ChildProcessError:
        failed = True
    if failed:
        time.sleep(STATUS_SECONDS)
        for line in obituaries(zip(names, processes, strict=True)):
            logger.error("%s", line)
        logger.error("FairKV: node %d ends, as a rank of the server has failed", node)
        kill_process_tree(psutil.Process().pid, include_parent=False)
        raise SystemExit(1)


def _first_failure(processes: Sequence[Any]) -> bool:
    """Wait until a process ends with an error (True) or all have ended without (False)."""
    running = list(processes)
    while running:
        connection.wait([process.sentinel for process in running])
        for process in running:
            process.join(0)
        if any(process.exitcode for process in running):
            return True
        running = [process for process in running if process.exitcode is None]
    return False


def before_replica_loop(controller: Any) -> None:
    """A replica whose rank dies ends the server; SGLang would go on sending it requests."""
    config = from_environment()
    if config is None or not config.enabled:
        return
    processes = list(controller.scheduler_procs)
    names = [_title(process.pid) for process in processes]
    threading.Thread(target=_watch, args=(processes, names), daemon=True).start()


def _title(pid: int) -> str:
    title = " ".join(psutil.Process(pid).cmdline()).strip()  # sglang::scheduler_DP1_TP0
    return title.removeprefix("sglang::")


def _watch(processes: Sequence[Any], names: Sequence[str]) -> None:
    server = psutil.Process().parent()
    if not _first_failure(processes):
        return
    time.sleep(STATUS_SECONDS)  # a server that ends kills its processes, this one with them
    for line in obituaries(zip(names, processes, strict=True)):
        logger.error("%s", line)
    for process in processes:  # SGLang waits a minute for the core dumps of those that live
        process.kill()
    if server is not None:
        server.send_signal(signal.SIGQUIT)


_TEST = "tests/engine/test_machines.py"

HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes",
        kind="after",
        function=after_launch_schedulers,
        why="a node without HTTP server ends with status 0 when its rank is killed, names none, "
        "and kills its ranks at a Ctrl-C that node 0 answers by waiting for requests",
        since="0.5.21",
        upstream="sglang/srt/entrypoints/engine.py (block_until_scheduler_exits)",
        test=_TEST,
    ),
)
"""Of a server's first process."""

REPLICAS = Hook(
    target="sglang.srt.managers.data_parallel_controller.DataParallelController.event_loop",
    kind="before",
    function=before_replica_loop,
    why="nobody watches the ranks of a replica, so requests to a dead one would wait for ever",
    since="0.5.21",
    upstream="sglang/srt/managers/data_parallel_controller.py (event_loop)",
    test=_TEST,
)
"""Of the data-parallel controller, which loads no plugins in SGLang 0.5.21."""

# SPDX-License-Identifier: Apache-2.0
"""Hooks on a server's start and end: its port is free, Ctrl-C ends it soon, a rank that died is
named.

SGLang answers SIGTERM by waiting for all requests, as whoever rolls out a new version wants it.
Ctrl-C it leaves to its HTTP server, which waits for them, too, while the ranks die of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from fairkv_sglang.config import ConfigError, from_environment
from fairkv_sglang.patches.ledger import Hook

logger = logging.getLogger(__name__)

GRACE_SECONDS = 2.0
"""Requests may go on for so long after Ctrl-C. SGLang looks every 5 s whether they are done."""
LAST_SECONDS = 8.5
"""A client that does not read its answer may hold up the end for so long."""
LOOK_SECONDS = 0.5
"""Between looks whether a server that is to stop is paused."""


def before_launch(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """A port that is taken ends the process before a model is loaded, with status 2."""
    config = from_environment()
    if config is None or not config.enabled:
        return
    try:
        host, port = server_args.host or "127.0.0.1", server_args.port
        check_port(host, port, f"--host {host} --port {port}: the server")
        if server_args.disaggregation_mode == "prefill":
            port = server_args.disaggregation_bootstrap_port
            check_port(host, port, f"--disaggregation-bootstrap-port {port}: rank 0")
        if server_args.nnodes > 1 and server_args.node_rank == 0 and server_args.dist_init_addr:
            address = server_args.dist_init_addr
            port = int(address.rpartition(":")[2])
            check_port("", port, f"--dist-init-addr {address}: node 0")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def check_port(host: str, port: int, who: str) -> None:
    """Listen for a moment as the server will.

    Args:
        host: Where; "" is everywhere.
        port: On which port.
        who: Flags and who will listen there, for the message.

    Raises:
        ConfigError: if that fails.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{who} cannot listen there ({reason}): give another port, or stop what uses it"
        ) from None


def after_handle_loop(result: None, manager: Any) -> None:
    """Ctrl-C ends a server soon; an ``Engine`` leaves it to its program.

    SGLang asks for its loop at every request. The handler is set each time (some microseconds), as
    the HTTP server sets its own at a moment of its choice.
    """
    if manager._server_stop_hook is None or manager.event_loop is None:
        return
    if threading.current_thread() is threading.main_thread():
        manager.event_loop.add_signal_handler(signal.SIGINT, end_soon, manager)


def end_soon(manager: Any) -> None:
    """As for SIGTERM, but requests that still run after a moment are aborted."""
    logger.warning("FairKV: Ctrl-C, the server ends; requests have %g s", GRACE_SECONDS)
    manager.gracefully_exit = True
    manager.event_loop.call_later(GRACE_SECONDS, abort_requests, manager)
    threading.Thread(target=_end_without_clients, daemon=True).start()


def abort_requests(manager: Any, again: bool = False) -> None:
    """Abort all requests, and those that come while the server ends.

    Args:
        manager: SGLang's tokenizer manager.
        again: Those that ran at the signal had a second to give their clients the answer.
    """
    if again:
        os.environ["SGL_FORCE_SHUTDOWN"] = "1"  # SGLang then no longer waits for new ones
    if left := len(manager.rid_to_state):
        logger.warning("FairKV: aborting %d requests that still run: the server ends", left)
        manager.abort_request(abort_all=True)
    manager.event_loop.call_later(1.0, abort_requests, manager, True)


def _end_without_clients() -> None:
    """The HTTP server waits for its connections; not for ever."""
    from sglang.srt.utils import kill_process_tree
    from sglang.srt.utils.cudacore_pyspy_dump_utils import collect_scheduler_processes

    time.sleep(LAST_SECONDS)
    while collect_scheduler_processes():  # SGLang gives them 15 s to release their devices
        time.sleep(0.1)
    logger.warning("FairKV: the server ends although clients hold their connections open")
    kill_process_tree(os.getpid(), include_parent=False)
    os._exit(0)


async def around_sigterm_watchdog(original: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    """A server that is asked to stop does not stay paused.

    SGLang ends when the last request has. While it is paused (``/pause_generation``) none can, and
    those whose clients are gone are not even looked at, so it would wait for ever with all ranks
    spinning.
    """
    resuming = asyncio.create_task(_resume(manager))
    try:
        await original(manager, *args, **kwargs)
    finally:
        resuming.cancel()


async def _resume(manager: Any) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput

    while True:
        if manager.gracefully_exit and manager.is_pause:
            logger.warning("FairKV: asked to stop while paused, so generation goes on")
            await manager.continue_generation(ContinueGenerationReqInput())
        await asyncio.sleep(LOOK_SECONDS)


def before_sigquit(handler: Any, *args: Any, **kwargs: Any) -> None:
    """Name the processes that died."""
    from sglang.srt.runtime_context import get_parallel

    watchdog = handler.tokenizer_manager._subprocess_watchdog
    if watchdog is not None:
        names = watchdog._names
        if get_parallel().dp_size > 1:  # the ranks are its, see watching.py
            names = [name.replace("scheduler_0", "the controller of replicas") for name in names]
        for line in obituaries(zip(names, watchdog._processes, strict=True)):
            logger.error("%s", line)


def obituaries(processes: Iterable[tuple[str, Any]]) -> list[str]:
    """One line for each process that ended with an error or was killed.

    Args:
        processes: SGLang's name of each and the ``multiprocessing.Process``.
    """
    lines = []
    for name, process in processes:
        if not (status := process.exitcode):
            continue
        who = f"{name.replace('scheduler_', 'rank ')} (process {process.pid})"
        if status == -signal.SIGKILL:
            how, advice = (
                "was killed (SIGKILL)",
                "the kernel does that when memory runs out: see dmesg, and give less to the KV "
                "cache (--mem-fraction-static, --max-total-tokens)",
            )
        elif status < 0:
            how, advice = (
                f"was ended by {signal.Signals(-status).name}",
                "the lines before this one may say why",
            )
        else:
            how, advice = f"ended with status {status}", "its traceback says why"
        lines.append(f"FairKV: {who} {how}, so the server ends; {advice}; then start it again")
    return lines


_MANAGER = "sglang.srt.managers.tokenizer_manager"
_TEST = "tests/engine/test_server.py"

HOOKS: tuple[Hook, ...] = (
    Hook(
        target=f"{_MANAGER}.TokenizerManager.auto_create_handle_loop",
        kind="after",
        function=after_handle_loop,
        why="Ctrl-C while requests run would wait for all of them, or end in tracebacks",
        since="0.5.17",
        upstream="sglang/srt/managers/tokenizer_manager.py",
        test=_TEST,
    ),
    Hook(
        target=f"{_MANAGER}.TokenizerManager.sigterm_watchdog",
        kind="around",
        function=around_sigterm_watchdog,
        why="a paused server that is asked to stop would wait for its requests for ever",
        since="0.5.17",
        upstream="sglang/srt/managers/tokenizer_manager.py",
        test="tests/patches/test_server.py",
    ),
    Hook(
        target=f"{_MANAGER}.SignalHandler.running_phase_sigquit_handler",
        kind="before",
        function=before_sigquit,
        why="nothing says which rank died, and of what",
        since="0.5.17",
        upstream="sglang/srt/managers/tokenizer_manager.py",
        test="tests/engine/test_chaos.py",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""``fairkv top``: a live view of a running server in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fairkv_sglang.cli.output import console as make_console
from fairkv_sglang.cli.remote import (
    ServerSilent,
    add_url_flags,
    checked_url,
    fairkv_states,
    server_info,
)
from fairkv_sglang.cli.top_view import View, frame

_KEY_SECONDS = 0.1
_TIMEOUT = 10.0
_DRAW_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the sub-command."""
    add_url_flags(parser, required=True)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds; default 1")
    parser.add_argument(
        "--replica",
        type=int,
        default=0,
        metavar="N",
        help="of a server with --dp-size: which, counted from 0",
    )
    parser.add_argument("--once", action="store_true", help="print one frame and leave")


def run(args: argparse.Namespace) -> int:
    """Show the server until q or Ctrl-C."""
    if not args.interval > 0:
        raise ValueError(f"--interval: {args.interval} must be above 0")
    console = make_console()
    view = View(checked_url(args.url), args.replica)
    if not args.once and not console.is_terminal:
        raise ValueError("standard output is no terminal: use --once")
    try:
        view.answered(*_ask(args), time.monotonic())
    except ServerSilent as error:
        if args.once:
            raise
        view.error = str(error)
    if args.once:
        console.print(_draw(view, console, console.height if console.is_terminal else 1 << 16))
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        _show(view, args, console)
    return 0


def _ask(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    info = server_info(args.url, args.api_key, _TIMEOUT)
    states = fairkv_states(info, args.url)
    if not 0 <= args.replica < len(states):
        raise ValueError(f"--replica {args.replica}: the server has {len(states)}, counted from 0")
    return info, states[args.replica]


def _show(view: View, args: argparse.Namespace, console: Console) -> None:
    """Draws until q is pressed; a thread asks, so that keys work while a server is slow."""
    ended = threading.Event()
    lock = threading.Lock()

    def keep_asking() -> None:
        while not ended.wait(args.interval):
            fresh, error = None, None
            try:
                fresh = _ask(args)
            except ValueError as problem:  # gone, or back as something else: it may change again
                error = str(problem)
            with lock:
                view.error = error
                if fresh is not None:
                    view.answered(*fresh, time.monotonic())

    # Not as an exception: raised inside a callback it would be swallowed, and the view go on.
    before = signal.signal(signal.SIGINT, lambda *_: ended.set())
    thread = threading.Thread(target=keep_asking, name="fairkv-top", daemon=True)
    with (
        _single_keys() as keys,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        thread.start()
        drawn = -_DRAW_SECONDS
        size = console.size
        state = None
        try:
            while not ended.is_set():
                with lock:
                    now = time.monotonic()
                    news = (view.seen, view.error)
                    if news != state or console.size != size or now - drawn >= _DRAW_SECONDS:
                        state, size, drawn = news, console.size, now
                        live.update(_draw(view, console, size.height), refresh=True)
                if _pressed(keys) in ("q", "Q", "\x03"):
                    return
        finally:
            ended.set()
            signal.signal(signal.SIGINT, before)


def _draw(view: View, console: Console, height: int) -> Text:
    return frame(view, console.width, height, blocks=console.encoding.startswith("utf"))


@contextlib.contextmanager
def _single_keys() -> Iterator[int | None]:
    """Keys without Enter; gives the descriptor to read, None if stdin is no terminal."""
    if not sys.stdin.isatty():
        yield None
        return
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    try:
        tty.setcbreak(number)
        yield number
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def _pressed(keys: int | None) -> str | None:
    """The key that was pressed in the last tenth of a second, if one was."""
    if keys is None:
        time.sleep(_KEY_SECONDS)
        return None
    if not select.select([keys], [], [], _KEY_SECONDS)[0]:
        return None
    # An end of file is the terminal's window being closed.
    return os.read(keys, 64)[:1].decode("ascii", "replace") or "q"

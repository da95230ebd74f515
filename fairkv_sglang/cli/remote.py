# SPDX-License-Identifier: Apache-2.0
"""What a running server says of itself over HTTP, for the commands that look at one."""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import urllib.error
import urllib.parse
import urllib.request
from typing import Any


class ServerSilent(ValueError):
    """Nobody answers at the address, or not in time; it may come (back) later."""


def add_url_flags(parser: argparse._ActionsContainer, required: bool) -> None:
    """``--url`` and ``--api-key``."""
    parser.add_argument(
        "--url", required=required, metavar="SERVER", help="a running server, http://HOST:PORT"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help="the server's key, if it was started with --api-key"
    )


def server_info(url: str, api_key: str | None = None, timeout: float = 30.0) -> dict[str, Any]:
    """The server's ``/server_info``.

    Args:
        url: ``http://HOST:PORT``; the scheme may be left out.
        api_key: Sent as ``Authorization: Bearer``.
        timeout: Seconds.

    Raises:
        ServerSilent: nobody answers, or a server that is just starting or ending does.
        ValueError: in one line, for an address that is none, a key that is missing or wrong, and
            for an answer that is not SGLang's.
    """
    address = checked_url(url)
    request = urllib.request.Request(address + "/server_info")
    if api_key:  # for this address alone, wherever it may lead
        request.add_unredirected_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            body = reply.read()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            hint = "is not this server's" if api_key else "is missing"
            raise ValueError(f"{address} wants its API key: --api-key {hint}") from None
        kind = ServerSilent if error.code >= 500 else ValueError
        raise kind(f"{address}/server_info answers {error.code} {error.reason}") from None
    except (TimeoutError, OSError, http.client.HTTPException) as error:
        raise ServerSilent(f"no server answers at {address} ({_reason(error)})") from None
    try:
        info = json.loads(body)
    except ValueError:
        info = None
    if not isinstance(info, dict) or not isinstance(info.get("internal_states"), list):
        raise ValueError(f"{address}/server_info is not that of an SGLang server")
    return info


def fairkv_states(info: dict[str, Any], url: str) -> list[dict[str, Any]]:
    """The part of ``/server_info`` that is FairKV's, of each replica by number; one at least.

    Raises:
        ValueError: in one line, if FairKV is off or cannot tell its state.
    """
    states: list[dict[str, Any]] = []
    for replica in info["internal_states"] or [None]:
        state = replica.get("fairkv") if isinstance(replica, dict) else None
        if not isinstance(state, dict) or not state.get("enabled", True):
            raise ValueError(f"FairKV is off on {checked_url(url)}: start the server with --fairkv")
        if "error" in state:
            raise ValueError(f"{checked_url(url)} cannot tell its state: {state['error']}")
        states.append(state)
    numbers = [state.get("replica") for state in states]
    if all(isinstance(number, int) for number in numbers):  # they answer in any order
        states.sort(key=lambda state: int(state["replica"]))
    return states


def checked_url(url: str) -> str:
    """The address without a path, ``http://`` if it names no scheme; ValueError if it is none."""
    text = url.strip() if "://" in url else f"http://{url.strip()}"
    try:
        parts = urllib.parse.urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, brackets that are not closed
        good = None
    if not good or any(letter.isspace() for letter in text):
        raise ValueError(f"{url!r} is not the address of a server; give http://HOST:PORT")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _reason(error: BaseException) -> str:
    cause = getattr(error, "reason", None)
    error = cause if isinstance(cause, BaseException) else error
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, socket.gaierror):
        return "unknown host"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
